"""Loss without logits: equal to the loss from logits where it is taken, and not taken where the head is not plain."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

import neuron_specialization as ns
from neuron_specialization.translation import loss
from neuron_specialization.translation.batching import label_shift
from neuron_specialization.translation.loss import find_linear_head, logits_cross_entropy, summed_cross_entropy

from .architectures import ARCHITECTURES, double, make, make_batch
from .conftest import PAIRS, make_m2m100, make_masks
from .conftest import make_batch as batch_of_labels

OTHER_HEADS = {"prophetnet", "fsmt"}  # several streams; an embedding is what the model calls its head
NAMES = [name for name in ARCHITECTURES if name not in OTHER_HEADS]


@pytest.fixture(autouse=True)
def chunks_of_two_tokens(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 128)
    monkeypatch.setattr(loss, "FEW_LOGITS", 0)


def text_batch() -> dict[str, torch.Tensor]:
    batch = batch_of_labels()
    return {**batch, "decoder_input_ids": label_shift(make_m2m100())(batch["labels"])}


def loss_and_gradients(model, batch, head, smoothing=0.1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss of a batch, from the head or (None) from logits, and every gradient."""
    model.zero_grad(set_to_none=True)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if head is None:
        logits = model(**inputs)["logits"].flatten(0, 1)
        total = logits_cross_entropy(logits, batch["labels"].flatten(), smoothing)
    else:
        with head.computes_loss(batch["labels"], smoothing):
            output = model(**inputs)["logits"]
        assert output.numel() == 1, "no logits"
        total = output.sum()
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(model, batch, **options) -> None:
    head = find_linear_head(model, batch)
    assert head is not None
    expected, found = (
        loss_and_gradients(model, batch, None, **options),
        loss_and_gradients(model, batch, head, **options),
    )
    exact = 1e-9 if expected[0].dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found[0], expected[0], rtol=exact, atol=exact)
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name],
            gradient,
            rtol=exact,
            atol=exact,
            equal_nan=True,  # LED's own, where there is padding
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert type(head.linear).forward is nn.Linear.forward and "forward" not in vars(head.linear)
    assert model(**batch)["logits"].shape[-1] == head.linear.out_features, "logits as before"


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_loses_the_same_without_logits(name):
    """Every parameter trains: with the biases, scales and tied embeddings of each, final_logits_bias not zero."""
    model, batch = double(name, make(name), make_batch(name))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias = torch.randn_like(model.final_logits_bias)
    if name == "t5gemma":
        model.config.decoder.final_logit_softcapping = None
    check_equal(model, batch)  # in eval: routers of experts add noise while training


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trainable", ["none", "delta", "low_rank", "full"])
def test_every_way_to_train_has_the_same_gradients_without_logits(trainable, smoothing):
    """In "none", nothing trains but one more module, as a user may want it."""
    options = {"trainable": trainable, "init_weights": trainable == "full", "task_type": "SEQ_2_SEQ_LM"}
    if trainable == "none":
        options["modules_to_save"] = ["layer_norm"]
    config = ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100()), **options)
    adapted = get_peft_model(make_m2m100(), config, autocast_adapter_dtype=False).double().train()
    check_equal(adapted, {**text_batch(), "language_pairs": PAIRS}, smoothing=smoothing)


@pytest.mark.parametrize("trainable", ["delta", "full"])
def test_the_weight_gradient_of_a_frozen_head_is_not_computed(trainable):
    """Not even to be thrown away: no product makes a matrix of the head's shape."""
    model = make_m2m100(vocab_size=61)  # a size that nothing else has
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), trainable=trainable, task_type="SEQ_2_SEQ_LM")
    adapted, batch = get_peft_model(model, config).train(), {**text_batch(), "language_pairs": PAIRS}
    head = find_linear_head(adapted, batch)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        loss_and_gradients(adapted, batch, head)
    made = set()
    for event in profiler.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.input_shapes["add" in event.name :][:2]
            made.add((left[0], right[1]))
    assert (tuple(head.linear.weight.shape) in made) == (trainable == "full")
    assert any(event.name == "aten::embedding_dense_backward" for event in profiler.events()) == (trainable == "full")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_formula_with_padding(dtype, bias):
    """In bfloat16 the sum over many chunks is as good as that from logits of the same precision."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 8).to(dtype), torch.randn(64, 8).to(dtype).requires_grad_()
    hidden.requires_grad_()
    labels = torch.randint(0, 64, (400,)).masked_fill(torch.rand(400) < 0.3, -100)
    offset = torch.randn(64).to(dtype).requires_grad_() if bias else None
    leaves = [hidden, weight] + ([offset] if bias else [])
    expected = logits_cross_entropy(nn.functional.linear(hidden, weight, offset), labels, 0.1)
    found = summed_cross_entropy(hidden, weight, labels, offset, 0.1)
    exact = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=min(exact, 2e-3), atol=exact)
    wanted = torch.autograd.grad(expected, leaves)
    for gradient, other in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=exact, atol=10 * exact)
    assert summed_cross_entropy(hidden, weight, torch.full_like(labels, -100), offset, 0.1) == 0


def test_under_autocast_the_head_computes_as_the_linear_layer_would():
    model, batch = make_m2m100(), text_batch()
    with torch.autocast("cpu", torch.bfloat16):
        head = find_linear_head(model, batch)
        expected, gradients = loss_and_gradients(model, batch, None)
        found, others = loss_and_gradients(model, batch, head)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert all(((others[name] - g).abs().max() < 0.05 * largest) for name, g in gradients.items())


def soft_capped() -> tuple:
    return make("t5gemma"), make_batch("t5gemma")


def with_lora() -> tuple:
    return get_peft_model(make_m2m100(), LoraConfig(target_modules=["lm_head"])), text_batch()


def with_saved_head() -> tuple:
    model = make_m2m100()
    masks = make_masks(model)
    config = ns.NeuronSpecializationConfig(masks=masks, modules_to_save=["lm_head"], task_type="SEQ_2_SEQ_LM")
    return get_peft_model(model, config), {**text_batch(), "language_pairs": PAIRS}


def hooked() -> tuple:
    model = make_m2m100()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model, text_batch()


def parametrized() -> tuple:
    model = make_m2m100()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model, text_batch()


def scaled_by_the_model() -> tuple:
    model = make_m2m100()
    model.register_forward_hook(lambda module, args, output: {"logits": 2 * output["logits"]})
    return model, text_batch()


def compiled() -> tuple:
    return torch.compile(make_m2m100(), backend="eager"), text_batch()


@pytest.mark.parametrize(
    "build", [soft_capped, with_lora, with_saved_head, hooked, parametrized, scaled_by_the_model, compiled]
)
def test_heads_that_are_not_plain_keep_their_logits(build):
    assert find_linear_head(*build()) is None


@pytest.mark.parametrize("name", sorted(OTHER_HEADS))
def test_other_heads_keep_their_logits(name):
    assert find_linear_head(make(name), make_batch(name)) is None


def test_an_error_in_the_forward_leaves_the_head_as_it_was():
    model, batch = copy.deepcopy(make("mbart")), make_batch("mbart")
    head = find_linear_head(model, batch)
    before = model.final_logits_bias
    with pytest.raises(AttributeError), head.computes_loss(batch["labels"], 0.1):
        model(unknown=1)
    assert model.final_logits_bias is before and "forward" not in vars(model.lm_head)
