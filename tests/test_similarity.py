"""CKA and spectra against closed forms."""

import copy

import pytest
import torch

from neuron_specialization.analysis.similarity import StreamingCKA, linear_cka
from neuron_specialization.analysis.spectrum import singular_values, spectrum_statistics, with_spectrum_of

from . import architectures
from .conftest import make_m2m100, make_t5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unbiased_hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """HSIC₁ as Song et al. (2012, equation 5) write it, from kernel matrices."""
    n = len(k)
    k, m, one = k.clone().fill_diagonal_(0), m.clone().fill_diagonal_(0), torch.ones(n, dtype=k.dtype)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


@pytest.mark.parametrize("debiased", [True, False])
def test_a_rotated_scaled_shifted_copy_is_the_same_and_noise_is_not(debiased):
    x = draw(200, 12)
    rotation, _ = torch.linalg.qr(draw(12, 12, seed=1))
    assert linear_cka(x, x, debiased) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ rotation + 100, debiased) == pytest.approx(1)
    stretched = x * torch.logspace(-2, 2, 12, dtype=x.dtype)
    assert linear_cka(x, stretched, debiased) < 0.9, "CKA is not invariant under every linear map"


def test_independent_noise_is_near_zero_only_when_debiased():
    x, y = draw(60, 50), draw(60, 40, seed=1)
    assert abs(linear_cka(x, y)) < 0.1
    assert linear_cka(x, y, debiased=False) > 0.3, "60 inputs in 50 dimensions look alike to the biased estimate"


def test_debiased_cka_is_that_of_the_kernel_matrices():
    x, y = draw(31, 7), draw(31, 7) @ draw(7, 5, seed=2) + draw(31, 5, seed=3)
    k, m = x @ x.T, y @ y.T
    expected = unbiased_hsic(k, m) / (unbiased_hsic(k, k) * unbiased_hsic(m, m)).sqrt()
    assert linear_cka(x + 1e3, y - 1e3) == pytest.approx(expected.item(), abs=1e-9)


def test_streaming_gives_the_number_of_all_at_once():
    layers = {"a": draw(50, 6), "b": draw(50, 6) + draw(50, 6, seed=1), "c": draw(50, 3, seed=2)}
    pairs = [("a", "b"), ("b", "c"), ("a", "a")]
    streamed = StreamingCKA(pairs)
    for part in (slice(0, 1), slice(1, 20), slice(20, 50)):
        streamed.update({name: values[part].float() for name, values in layers.items()})
    for (first, second), found in streamed.similarity().items():
        expected = linear_cka(layers[first].float(), layers[second].float())
        assert found == pytest.approx(expected, abs=1e-9), (first, second)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="one row per input.*x 5, y 6"):
        linear_cka(draw(5, 2), draw(6, 2))
    with pytest.raises(ValueError, match="at least 4 inputs, got 3"):
        linear_cka(draw(3, 2), draw(3, 2))
    with pytest.raises(ValueError, match="does not vary: y"):
        linear_cka(draw(5, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"\[inputs, width\], got torch.float64 \[2, 3, 4\]"):
        linear_cka(draw(2, 3, 4), draw(2, 3, 4))
    streamed = StreamingCKA([("a", "b")])
    with pytest.raises(ValueError, match="missing: b"):
        streamed.update({"a": draw(5, 2)})


def test_statistics_of_known_spectra():
    flat, single = spectrum_statistics(torch.ones(8)), spectrum_statistics(torch.tensor([5.0, 0.0, 0.0]))
    assert flat["effective_rank"] == pytest.approx(8) and flat["stable_rank"] == pytest.approx(8)
    assert flat["frobenius"] == pytest.approx(8**0.5) and flat["spectral"] == flat["mean"] == 1
    assert single["effective_rank"] == pytest.approx(1) and single["stable_rank"] == 1
    with pytest.raises(ValueError, match="at least one above zero"):
        spectrum_statistics(torch.zeros(3))


@pytest.mark.parametrize(
    "make", [make_m2m100, make_t5, lambda: architectures.make("marian")], ids=["pre", "t5", "post"]
)
def test_folding_removes_what_norms_and_matrices_can_trade(make):
    """A gain scaled up and the matrices behind it scaled down: same model, same spectrum."""
    model = make()
    traded = copy.deepcopy(model)
    blocks = [m for n, m in traded.named_modules() if n.endswith(("encoder.layers.0", "encoder.block.0.layer.1"))]
    norm, linears = _norm_before_ffn(blocks[0])
    with torch.no_grad():
        norm.weight.mul_(4)
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(4)
        for linear in linears:
            linear.weight.div_(4)
    name = next(n for n, m in traded.named_modules() if m is linears[0]) + ".weight"
    before, after = singular_values(model), singular_values(traded)
    torch.testing.assert_close(before[name], after[name])
    raw = singular_values(traded, fold_norms=False)[name]
    torch.testing.assert_close(raw * 4, singular_values(model, fold_norms=False)[name])
    named = [n for n in before if n != "lm_head.weight"]  # which may share the embedding's, with a gain of its own
    assert model.training is False and len(named) == len({id(p) for n, p in model.named_parameters() if n in named})


def _norm_before_ffn(block):
    """Return the norm that the FFN of a Transformer layer reads, and the projections that read it."""
    if hasattr(block, "DenseReluDense"):
        return block.layer_norm, [m for n, m in block.DenseReluDense.named_children() if n.startswith("wi")]
    pre_norm = not type(block).__name__.startswith("Marian")
    return (block.final_layer_norm if pre_norm else block.self_attn_layer_norm), [block.fc1]


def test_gains_of_gemma_are_one_plus_the_weight():
    model = architectures.make("t5gemma")
    folded, raw = singular_values(model), singular_values(model, fold_norms=False)
    changed = [name for name in folded if not torch.allclose(folded[name], raw[name])]
    assert not changed, "all its norms start with weight 0, a gain of one"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.fill_(1.0)
    doubled = singular_values(model)
    gate = next(name for name in raw if "encoder" in name and "gate_proj" in name)
    torch.testing.assert_close(doubled[gate], 2 * raw[gate])


@pytest.mark.parametrize("make", [make_m2m100, lambda: architectures.make("t5gemma")], ids=["m2m100", "t5gemma"])
def test_the_spectrum_of_the_source_is_put_under_the_vectors_of_a_model(make):
    source = make()
    for name, parameter in source.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    for name, parameter in with_spectrum_of(source, source).named_parameters():
        torch.testing.assert_close(parameter, source.get_parameter(name), rtol=1e-5, atol=1e-5)
    trained = copy.deepcopy(source)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    before = {name: parameter.clone() for name, parameter in trained.named_parameters()}
    restored = with_spectrum_of(trained, source)
    expected, found = singular_values(source), singular_values(restored)
    for name in expected.keys() & dict(source.named_parameters()):  # a tied output keeps its gain
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
        assert not restored.get_parameter(name).equal(source.get_parameter(name)), "the vectors are not the source's"
    for name, parameter in trained.named_parameters():
        assert parameter.equal(before[name]), "the model itself stays"
        assert name in expected or restored.get_parameter(name).equal(parameter)
    other = make_m2m100(d_ff=24)
    with pytest.raises(ValueError, match="the same names and shapes"):
        with_spectrum_of(other, source)
