"""LaSS: masks over weights, per direction, and the multilingual model trained on under them."""

import copy

import pytest
import torch

import neuron_specialization as ns
from neuron_specialization.baselines.dropout import set_dropout
from neuron_specialization.baselines.lass import for_fine_tuning, lass, magnitude_masks, mask_bytes
from neuron_specialization.neurons.adapter_file import unpack_rows
from neuron_specialization.translation.runs import load_trained
from neuron_specialization.translation.token_loss import token_losses
from neuron_specialization.translation.training import fit

from .conftest import make_m2m100, make_t5
from .test_training import arguments, weights, with_dropout

PAIRS = ["Pv-Aa", "Pv-Ba", "Aa-Pv", "Ba-Pv"]


def masks_of_noisy_copies(model, alpha, pairs=tuple(PAIRS)):
    """Masks of several pairs: each pair's copy has weights of its own, as after fine-tuning."""
    per_pair = []
    for seed in range(len(pairs)):
        copied = copy.deepcopy(model)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * parameter.std())
        per_pair.append(magnitude_masks(copied, alpha))
    return {name: torch.stack([masks[name] for masks in per_pair]) for name in per_pair[0]}


def kept_weights(model, masks, pair):
    """Parameter → bool in its shape, of one pair's masks."""
    modules = dict(model.named_modules())
    found = {}
    for stack, prefix in (("encoder", "model.encoder."), ("decoder", "model.decoder.")):
        for name, packed in masks.items():
            if name.startswith(f"{stack}."):
                module = prefix + name.removeprefix(f"{stack}.")
                found[f"{module}.weight"] = unpack_rows(packed[PAIRS.index(pair)], modules[module].in_features)
    return found


@pytest.mark.parametrize("make", [make_m2m100, make_t5])
def test_the_smallest_weights_of_each_attention_and_ffn_matrix_are_pruned(make):
    model = make()
    masks = magnitude_masks(model, 0.3)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    assert len(masks) == len(linears)
    for (name, packed), (module, linear) in zip(masks.items(), linears.items(), strict=True):
        assert module.endswith(name)
        kept = unpack_rows(packed, linear.in_features)
        magnitudes = linear.weight.abs()
        pruned = int(0.3 * magnitudes.numel())
        assert int((~kept).sum()) == pruned
        assert magnitudes[kept].min() > magnitudes[~kept].max()
        assert packed.dtype == torch.uint8 and packed.shape == (linear.out_features, -(-linear.in_features // 8))
    with torch.no_grad():
        for linear in linears.values():
            linear.weight[0, 0] = 0
    whole = magnitude_masks(model, 0.0).values()
    assert all(unpack_rows(each, m.in_features).all() for each, m in zip(whole, linears.values(), strict=True))
    with torch.no_grad():
        next(iter(linears.values())).weight.fill_(0.5)
    assert not next(iter(magnitude_masks(model, 0.3).values())).any(), "equal weights are on one side of the threshold"
    with pytest.raises(ValueError, match=r"in \[0, 1\); got 1"):
        magnitude_masks(model, 1)


@pytest.mark.parametrize("updates", [1, 4])
def test_alpha_0_equals_fine_tuning_update_by_update(updates, toy_model, toy_tokenizer, toy_data, tmp_path):
    data = {pair: rows.select(range(16)) for pair, rows in toy_data["train"].items()}
    masks = masks_of_noisy_copies(toy_model, 0.0)
    dense = with_dropout(copy.deepcopy(toy_model))
    masked = lass(with_dropout(copy.deepcopy(toy_model)), masks, PAIRS)
    for model in (dense, masked):
        args = arguments(tmp_path / type(model).__name__, max_steps=updates, gradient_accumulation_steps=2)
        fit(model, toy_tokenizer, data, None, args)
    trained = weights(masked.get_base_model())
    for name, weight in weights(dense).items():
        other = trained[name if name in trained else name.replace("fc1.", "fc1.base_layer.")]
        assert other.equal(weight), name
    assert not dense.model.shared.weight.equal(toy_model.model.shared.weight)


def test_weights_that_a_direction_does_not_keep_stay_where_they_are(toy_model, toy_tokenizer, toy_data, tmp_path):
    masks = masks_of_noisy_copies(toy_model, 0.5)
    before = weights(toy_model)
    kept = kept_weights(toy_model, masks, "Pv-Aa")
    masked = lass(copy.deepcopy(toy_model), masks, PAIRS)
    fit(masked, toy_tokenizer, {"Pv-Aa": toy_data["train"]["Pv-Aa"]}, None, arguments(tmp_path, max_steps=3))
    after = {name.replace(".base_layer", ""): weight for name, weight in weights(masked.get_base_model()).items()}
    for name, mask in kept.items():
        assert after[name][~mask].equal(before[name][~mask]), name
        assert not after[name][mask].equal(before[name][mask]), name
    for shared in ("model.shared.weight", "model.encoder.layers.0.fc1.bias", "model.decoder.layer_norm.weight"):
        assert not after[shared].equal(before[shared]), "what is not pruned is shared by all"


def test_a_pair_runs_with_the_weights_it_keeps(toy_model, toy_tokenizer, toy_data, tmp_path):
    """In scoring and beam search, also where what was trained is loaded into a model made alike."""
    masks = masks_of_noisy_copies(toy_model, 0.5)
    trained = copy.deepcopy(toy_model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    lass(copy.deepcopy(trained), masks, PAIRS).save_pretrained(tmp_path)
    masked = lass(copy.deepcopy(toy_model), masks, PAIRS)
    load_trained(masked, tmp_path)
    rows = {pair: toy_data["test"][pair].select(range(4)) for pair in PAIRS}
    for pair in PAIRS:
        reference = copy.deepcopy(trained)
        with torch.no_grad():
            for name, mask in kept_weights(trained, masks, pair).items():
                reference.get_parameter(name)[~mask] = 0
        expected = token_losses(reference, toy_tokenizer, {pair: rows[pair]})
        sources, options = rows[pair]["source"], {"num_beams": 3, "max_new_tokens": 6}
        translated = ns.translate(reference, toy_tokenizer, sources, pair, **options)
        assert token_losses(masked, toy_tokenizer, {pair: rows[pair]}) == pytest.approx(expected, rel=1e-5)
        assert ns.translate(masked, toy_tokenizer, sources, pair, **options) == translated
    dense = token_losses(trained, toy_tokenizer, rows)
    assert token_losses(masked, toy_tokenizer, rows) != pytest.approx(dense, rel=1e-3)
    with masked.disable_adapter():
        assert token_losses(masked, toy_tokenizer, rows) == pytest.approx(dense, rel=1e-5)
    weights_masked = sum(mask.numel() for mask in kept_weights(toy_model, masks, PAIRS[0]).values())
    assert mask_bytes(masked) == len(PAIRS) * weights_masked // 8 and mask_bytes(toy_model) == 0
    batch = {"input_ids": torch.tensor([[5, 6]] * 2), "labels": torch.tensor([[7, 8]] * 2)}
    reference = copy.deepcopy(trained)
    with torch.no_grad():
        for name, mask in kept_weights(trained, masks, "Aa-Pv").items():
            mask = mask if "encoder.layers" in name else kept_weights(trained, masks, "Pv-Ba")[name]
            reference.get_parameter(name)[~mask] = 0
        zero_shot = masked(**batch, language_pairs=["Aa-Ba"]).logits
        torch.testing.assert_close(zero_shot, reference(**batch).logits)
    with pytest.raises(ValueError, match="one language pair, the same for all"):
        masked(**batch, language_pairs=PAIRS[:2])


def test_directions_are_fine_tuned_with_the_dropout_of_the_paper(toy_model):
    copied = for_fine_tuning(toy_model)
    found = [
        {m.dropout for m in each.modules() if isinstance(getattr(m, "dropout", None), float)}
        for each in (copied, toy_model)
    ]
    assert found[0] == {0.3} != found[1]
    assert weights(copied).keys() == weights(toy_model).keys() and copied is not toy_model


def test_validation_data_of_any_size_runs_one_direction_at_a_time(toy_model, toy_tokenizer, toy_data, tmp_path):
    """Batches of three from ten sentences each: those that run over into the next direction would have two masks."""
    data = {pair: toy_data["validation"][pair].select(range(10)) for pair in PAIRS}
    model = lass(toy_model, masks_of_noisy_copies(toy_model, 0.3), PAIRS)
    args = arguments(tmp_path, max_steps=1, eval_steps=1, per_device_eval_batch_size=3, learning_rate=1e-9)
    found = fit(model, toy_tokenizer, data, data, args)
    losses = token_losses(model, toy_tokenizer, data)
    assert min(losses.values()) < found["masked_validation_loss"] < max(losses.values())


def test_dropout_is_set_wherever_a_model_keeps_it():
    for make in (make_m2m100, make_t5):
        model = make().train()
        batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[7, 8]])}
        torch.manual_seed(0)
        assert model(**batch).loss == model(**batch).loss
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0  # as a configuration with "dropout": 0 makes it
        set_dropout(model, 0.3)
        assert model(**batch).loss != model(**batch).loss
