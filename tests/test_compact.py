"""Compact execution: outputs and gradients are those of the masked path, and it knows when it may not run."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper

import neuron_specialization as ns
from neuron_specialization.adapter import compact as compact_module
from neuron_specialization.adapter import compact_policy
from neuron_specialization.adapter.layer import NeuronSpecializationLayer

from .conftest import PAIRS, checkpoint_activations, make_batch, make_m2m100, make_masks, make_t5

pytestmark = pytest.mark.usefixtures("small_batches_run_compact")

MODELS = {"plain": make_m2m100, "gated": make_t5, "plain without biases": lambda: make_t5("relu")}


def pair_of_models(make, mode="full", kept=None, **config):
    """The same adapted model twice: masked and compact; with so many neurons kept at random, or selected ones."""
    model = make().double()
    masks = make_masks(model)
    for name, rows in masks.rows.items() if kept is not None else ():
        masks.rows[name] = torch.rand(rows.shape).argsort(-1) < kept
    settings = {"masks": masks, "trainable": mode, "task_type": "SEQ_2_SEQ_LM", **config}
    models = []
    for execution in ("masked", "compact"):
        adapted = get_peft_model(copy.deepcopy(model), ns.NeuronSpecializationConfig(**settings, execution=execution))
        models.append(adapted)
    models[1].load_state_dict(models[0].state_dict())
    return models


def widths(model) -> dict[str, int]:
    """Widths that really enter the down projections."""
    seen = {}
    for name, module in model.named_modules():
        if name.endswith((".fc2", ".wo")):
            original = module.forward

            def forward(x, name=name, original=original):
                seen[name] = x.shape[-1]
                return original(x)

            module.forward = forward
    return seen


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mode", ["none", "delta", "low_rank", "full"])
@pytest.mark.parametrize("mask_bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_masked_path(make, mode, mask_bias):
    masked, compact = pair_of_models(make, mode, mask_bias=mask_bias, init_weights=False)
    batch = make_batch(pad=masked.config.pad_token_id)
    for training in (True, False):
        losses = []
        for model in (masked, compact):
            model.train(training)
            model.zero_grad()
            losses.append(model(**batch, language_pairs="en-fr"))
            if mode != "none":
                losses[-1].loss.backward()
        torch.testing.assert_close(losses[1].logits, losses[0].logits, rtol=1e-9, atol=1e-10)
        reference = dict(masked.named_parameters())
        for name, parameter in compact.named_parameters():
            assert (parameter.grad is None) == (reference[name].grad is None), name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("kept", [1, 16, 17, 19, 20])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mask_bias", [False, True])
def test_every_number_of_kept_neurons_gives_the_same(make, kept, mask_bias):
    """Of 20 neurons (28 in a decoder): one, all, a full width, and what is filled up to it or to the whole block."""
    masked, compact = pair_of_models(make, "full", kept=kept, mask_bias=mask_bias)
    batch = make_batch(pad=masked.config.pad_token_id)
    outputs = [model(**batch, language_pairs="en-fr") for model in (masked, compact)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-9, atol=1e-10)
    for output in outputs:
        output.loss.backward()
    reference = dict(masked.named_parameters())
    for name, parameter in compact.named_parameters():
        expected = reference[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(("kept", "width"), [(1, 16), (16, 16), (17, 20), (20, 20)])
def test_kept_neurons_are_computed_and_few_others(kept, width):
    _, compact = pair_of_models(make_m2m100, "none", kept=kept)
    seen = widths(compact.get_base_model())
    with torch.no_grad():
        compact(**make_batch(), language_pairs="en-de")
    assert {found for name, found in seen.items() if "encoder" in name} == {width}


@pytest.mark.parametrize("training", [True, False])
def test_auto_runs_compact_only_where_one_pair_is_in_the_batch(training):
    model = make_m2m100()
    adapted = get_peft_model(
        model, ns.NeuronSpecializationConfig(masks=make_masks(model), trainable="full", task_type="SEQ_2_SEQ_LM")
    ).train(training)
    seen = widths(adapted.get_base_model())
    full = {name: 20 if "encoder" in name else 28 for name in seen or dict.fromkeys(_downs(adapted))}
    for chosen, is_compact in (
        (PAIRS, False),
        ("en-de", True),
        (torch.tensor([1] * 4), True),
        (torch.tensor([1, 2] * 2), False),
    ):
        seen.clear()
        adapted(**make_batch(), language_pairs=chosen)
        assert all((seen[name] < full[name]) == is_compact for name in seen), (chosen, seen)


def _downs(model) -> list[str]:
    return [name for name, _ in model.get_base_model().named_modules() if name.endswith("fc2")]


def changes():
    def in_place(model, layer):
        with torch.no_grad():
            layer.weight.mul_(1.5)

    def unnoticed(model, layer):
        layer.weight.data.mul_(1.5)
        layer.compact_block.down.weight.data.add_(0.5)

    def replaced(model, layer):
        layer.weight.data = layer.weight.data * 2
        layer.weight.data = layer.weight.data * 2

    def down(model, layer):
        with torch.no_grad():
            layer.compact_block.down.weight.mul_(-1)

    def bias(model, layer):
        with torch.no_grad():
            layer.bias.add_(1)

    def delta(model, layer):
        with torch.no_grad():
            layer.neuron_specialization_delta["default"].mul_(-2)

    def mask(model, layer):
        layer.neuron_specialization_mask["default"][:, 0] = 5

    def cast(model, layer):
        model.float()

    def loaded(model, layer):
        state = {
            name: value * 1.1 if value.is_floating_point() else value for name, value in model.state_dict().items()
        }
        model.load_state_dict(state)

    def trained(model, layer):
        model.train()
        loss = model(**make_batch(), language_pairs="en-de").loss
        loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
        model.eval()

    return {f.__name__: f for f in (in_place, unnoticed, replaced, down, bias, delta, mask, cast, loaded, trained)}


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_cached_weights_follow_every_change(change):
    masked, compact = (model.eval() for model in pair_of_models(make_m2m100, "delta", init_weights=False))
    batch = make_batch()
    with torch.no_grad():
        before = compact(**batch, language_pairs="en-de").logits
    for model in (masked, compact):
        change(model, model.get_base_model().model.encoder.layers[0].fc1)
    with torch.no_grad():
        found = compact(**batch, language_pairs="en-de").logits
        expected = masked(**batch, language_pairs="en-de").logits
        other = compact(**batch, language_pairs="fr-en").logits
        torch.testing.assert_close(other, masked(**batch, language_pairs="fr-en").logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert change.__name__ == "cast" or not torch.allclose(found, before)


def test_weights_are_gathered_once_per_generation(monkeypatch):
    _, compact = (model.eval() for model in pair_of_models(make_m2m100, "delta"))
    gathered = []
    original = compact_module.CompactWeights._take

    def count(self, values, dim=0):
        gathered.extend([values] if values.ndim == 2 else [])
        return original(self, values, dim)

    monkeypatch.setattr(compact_module.CompactWeights, "_take", count)
    for calls in (1, 2):
        compact.generate(input_ids=make_batch()["input_ids"], language_pairs="en-de", num_beams=2, max_new_tokens=8)
        assert len(gathered) == 2 * 4 * calls, "W1 and W2 once for each of four blocks"


def test_nothing_gathered_outlives_its_call(monkeypatch):
    """Else a model would hold the kept part of its FFNs twice for as long as it waits for the next call."""
    _, compact = (model.eval() for model in pair_of_models(make_m2m100, "none"))
    alive = weakref.WeakSet()
    original = compact_module.CompactWeights._gather_up

    def gather(self):
        weight, bias = original(self)
        alive.add(weight)
        return weight, bias

    monkeypatch.setattr(compact_module.CompactWeights, "_gather_up", gather)
    seen = []
    compact.get_base_model().lm_head.register_forward_hook(lambda *args: seen.append(len(alive)))
    with torch.no_grad():
        compact(**make_batch(), language_pairs="en-de")
        compact.generate(input_ids=make_batch()["input_ids"], language_pairs="en-de", max_new_tokens=3)
    assert seen[0] == 0 < seen[1], "decoder steps share them"
    assert not alive


def test_blocks_remember_the_last_rows_only(monkeypatch):
    monkeypatch.setattr(compact_module, "LOOKED_UP", 1)
    _, compact = pair_of_models(make_m2m100, "none")
    blocks = [module.compact_block for module in compact.modules() if isinstance(module, NeuronSpecializationLayer)]
    with torch.no_grad():
        for pair in PAIRS:
            compact(**make_batch(), language_pairs=pair)
    assert [len(block.looked_up) for block in blocks] == [1] * 4
    compact.delete_adapter("default")
    assert not any(block.looked_up for block in blocks)


def test_gathering_for_few_tokens_is_left_where_it_cannot_pay(monkeypatch):
    """A forward of few tokens runs masked; decoder steps use what they gathered again and again."""
    monkeypatch.setattr(compact_policy, "FEW_TOKENS", 256)
    model = make_m2m100()
    adapted = get_peft_model(
        model, ns.NeuronSpecializationConfig(masks=make_masks(model), trainable="none", task_type="SEQ_2_SEQ_LM")
    ).eval()
    seen = widths(adapted.get_base_model())
    with torch.no_grad():
        adapted(**make_batch(), language_pairs="en-de")
        assert set(seen.values()) == {20, 28}
        adapted(**make_batch(batch=40), language_pairs="en-de")
        assert set(seen.values()) == {16}
        adapted.generate(input_ids=make_batch()["input_ids"], language_pairs="en-de", max_new_tokens=4)
    assert {width for name, width in seen.items() if "encoder" in name} == {20}
    assert {width for name, width in seen.items() if "decoder" in name} == {16}


def test_a_model_made_in_inference_mode_runs_compact():
    with torch.inference_mode():
        masked, compact = pair_of_models(make_m2m100, "none")
        found = compact(**make_batch(), language_pairs="en-de").logits
        torch.testing.assert_close(found, masked(**make_batch(), language_pairs="en-de").logits)


def test_training_goes_on_after_translating():
    """What was looked up in inference mode is saved for a backward pass."""
    _, compact = pair_of_models(make_m2m100, "full")
    with torch.inference_mode():
        compact(**make_batch(), language_pairs="en-de")
    compact.train()(**make_batch(), language_pairs="en-de").loss.backward()


def obstacles():
    def accelerate_hook(model):
        add_hook_to_module(model.model.encoder.layers[0].fc2, AlignDevicesHook("cpu"))

    def hook(model):
        model.model.encoder.layers[0].fc2.register_forward_hook(lambda module, args, output: output)

    def activation_hook(model):
        model.model.encoder.layers[0].activation_fn.register_forward_hook(lambda module, args, output: None)

    def forward_of_its_own(model):
        linear = model.model.encoder.layers[0].fc1.base_layer
        linear.forward = lambda x, whole=linear.forward: whole(x)

    def lora(model):
        model.add_adapter(LoraConfig(target_modules=["fc2"], init_lora_weights=False), "lora")

    def dropout(model):
        model.train()
        for layer in model.model.encoder.layers:
            layer.activation_dropout = 0.5

    def partitioned(model):
        """As ZeRO-3 does: the weight is there only while its module runs."""
        linear = model.model.decoder.layers[0].fc1.base_layer
        whole, part = linear.weight.data, torch.empty(0)

        def gather(module, args):
            module.weight.data = whole

        def partition(module, args, output):
            module.weight.data = part

        linear.weight.data = part
        linear.register_forward_pre_hook(gather)
        linear.register_forward_hook(partition)

    return {
        f.__name__: f for f in (accelerate_hook, hook, activation_hook, forward_of_its_own, lora, dropout, partitioned)
    }


@pytest.mark.parametrize("attach", obstacles().values(), ids=obstacles())
def test_auto_runs_masked_where_something_else_is_attached_and_says_so_once(attach):
    model = make_m2m100()
    masks = make_masks(model)
    model.add_adapter(ns.NeuronSpecializationConfig(masks=masks, trainable="none"), "masks")
    attach(model)
    if attach.__name__ == "lora":
        model.set_adapter(["masks", "lora"])
    with pytest.warns(UserWarning, match="run masked, not compact, because of"):
        model(**make_batch(), language_pairs="en-de")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**make_batch(), language_pairs="en-de")


def test_lora_that_was_there_first_keeps_its_effect():
    """It stands where the block's down projection is found."""
    masks, batch = make_masks(make_m2m100()), make_batch()
    logits = []
    for first in ("lora", "masks"):
        model = make_m2m100()
        torch.manual_seed(0)
        configs = {
            "lora": LoraConfig(target_modules=["fc2"], init_lora_weights=False),
            "masks": ns.NeuronSpecializationConfig(masks=masks, trainable="none"),
        }
        for name in sorted(configs, key=lambda name: name != first):
            torch.manual_seed(0)
            model.add_adapter(configs[name], name)
        model.set_adapter(["lora", "masks"])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            logits.append(model.eval()(**batch, language_pairs="en-de").logits)
    torch.testing.assert_close(*logits)


def test_demanded_compact_execution_that_is_not_possible_is_an_error():
    _, compact = pair_of_models(make_m2m100, "none")
    with pytest.raises(ValueError, match="execution='compact' is not possible.*one language pair"):
        compact(**make_batch(), language_pairs=PAIRS)
    compact.get_base_model().model.encoder.layers[0].fc2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks on its projections"):
        compact(**make_batch(), language_pairs="en-de")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    masked, compact = pair_of_models(make_m2m100, "full")
    masked(**make_batch(), language_pairs="en-de").loss.backward()
    checkpoint_activations(compact.train().get_base_model(), use_reentrant)
    compact.enable_input_require_grads()
    compact(**make_batch(), language_pairs="en-de").loss.backward()
    reference = dict(masked.named_parameters())
    for name, parameter in compact.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_recording_runs_masked(make):
    masked, compact = pair_of_models(make, "none")
    batches = {"en-de": [{**make_batch(), "language_pairs": "en-de"}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts, expected = (ns.record_activations(m, batches, progress=False).counts for m in (compact, masked))
    assert all(counts[name].equal(expected[name]) for name in expected)
    assert all(count.shape[1] in (20, 28) for count in counts.values())


def test_a_compiled_projection_runs_masked():
    masked, _ = pair_of_models(make_m2m100, "none")
    model = copy.deepcopy(masked)
    for module in model.modules():
        if hasattr(module, "execution"):
            module.execution["default"] = "auto"
    model.get_base_model().model.decoder.layers[0].fc2.compile(backend="eager")
    with torch.no_grad(), pytest.warns(UserWarning, match="masked, not compact, because of hooks"):
        found = model(**make_batch(), language_pairs="en-de").logits
    torch.testing.assert_close(found, masked(**make_batch(), language_pairs="en-de").logits)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_projections_show_what_they_are_and_are_put_back(make):
    model = make()
    keys, before, blocks = list(model.state_dict()), str(model), ns.find_ffn_blocks(model)
    adapted = get_peft_model(model, ns.NeuronSpecializationConfig(masks=make_masks(model), task_type="SEQ_2_SEQ_LM"))
    shown = [module for module in adapted.modules() if isinstance(module, compact_module.CompactLinear)]
    assert "CompactLinear(" in str(adapted) and len(shown) == sum(b.gate is not None for b in blocks) + len(blocks)
    own = [key.replace(".base_layer", "") for key in model.state_dict() if "neuron_specialization" not in key]
    assert own == keys, "saved keys stay those of the base"
    for copied in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert str(copied) == str(adapted)
    unloaded = adapted.unload()
    assert str(unloaded) == before and list(unloaded.state_dict()) == keys
    assert not any({"forward", "compact_block"} & vars(module).keys() for module in unloaded.modules())


def test_refused_merges_leave_compact_execution_as_it_was():
    masked, compact = (model.eval() for model in pair_of_models(make_m2m100, "delta", init_weights=False))
    with pytest.raises(ValueError, match="none was chosen"):
        compact.merge_and_unload()
    found, expected = (model(**make_batch(), language_pairs="en-de").logits for model in (compact, masked))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_decision_is_made_once_per_block_and_pass(make, monkeypatch):
    asked = []
    original = compact_policy.why_masked
    monkeypatch.setattr(compact_policy, "why_masked", lambda *args: asked.append(1) or original(*args))
    for model in pair_of_models(make, "none"):
        asked.clear()
        model(**make_batch(pad=model.config.pad_token_id), language_pairs="en-de")
        assert len(asked) == 4


def test_a_pass_that_is_cut_off_hands_nothing_on():
    """Between the projections of a gated block, by an error that the caller goes on after."""
    model = pair_of_models(make_t5, "none")[1].eval()
    batch = make_batch(pad=0)
    expected = model(**batch, language_pairs="en-de").logits
    ffn = model.get_base_model().encoder.block[0].layer[1].DenseReluDense
    whole, cut = ffn.forward, []

    def forward(x):
        if not cut:
            cut.append(ffn.wi_0(x[:1]))
        return whole(x)

    ffn.forward = forward
    assert model(**batch, language_pairs="en-de").logits.equal(expected) and cut


@pytest.mark.parametrize("activation", [torch.sigmoid, torch.cos], ids=["sigmoid", "cos"])
@pytest.mark.parametrize("mask_bias", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_activations_that_are_not_zero_at_zero(make, mask_bias, activation):
    def with_activation():
        model = make()
        for module in model.modules():
            for name in ("act", "activation_fn"):
                if hasattr(module, name):
                    delattr(module, name)
                    setattr(module, name, activation)
        return model

    masked, compact = (model.eval() for model in pair_of_models(with_activation, "delta", mask_bias=mask_bias))
    batch = {**make_batch(pad=masked.config.pad_token_id), "language_pairs": "en-de"}
    expected = masked(**batch).logits
    if make is make_t5:
        with pytest.raises(ValueError, match="not zero at zero"):
            compact(**batch)
        with pytest.raises(ValueError, match="not zero at zero"):
            ns.compact(masked, "en-de")
    else:
        torch.testing.assert_close(compact(**batch).logits, expected)
        batch.pop("language_pairs")
        torch.testing.assert_close(ns.compact(masked, "en-de")(**batch).logits, expected)


def test_a_projection_that_is_trained_whole_is_copied_without_its_layer():
    """PEFT copies the modules in modules_to_save; a block that can run compact knows all of its layer."""
    config = {"masks": make_masks(make_m2m100(), ("en-de",)), "modules_to_save": ["fc2"], "task_type": "SEQ_2_SEQ_LM"}
    adapted = get_peft_model(make_m2m100(), ns.NeuronSpecializationConfig(**config)).eval()
    expected = adapted(**make_batch()).logits
    wrappers = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    copies = [wrapper.modules_to_save["default"] for wrapper in wrappers]
    assert len(copies) == 4 and {type(module) for module in copies} == {torch.nn.Linear}
    assert not any("compact_block" in vars(module) for module in copies)
    again = copy.deepcopy(adapted)
    assert again(**make_batch()).logits.equal(expected)
    unloaded = again.merge_and_unload()
    torch.testing.assert_close(unloaded(**make_batch()).logits, expected)
    assert not any("neuron_specialization" in type(module).__module__ for module in unloaded.modules())


def test_a_projection_that_torch_parametrized_is_copied_as_it_is():
    """Its class is made for it."""
    adapted = get_peft_model(make_m2m100(), ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100()))).eval()
    torch.nn.utils.parametrizations.weight_norm(adapted.get_submodule("base_model.model.model.encoder.layers.0.fc2"))
    expected = adapted(**make_batch(), language_pairs="en-de").logits
    assert copy.deepcopy(adapted)(**make_batch(), language_pairs="en-de").logits.equal(expected)
