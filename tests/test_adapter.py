"""What the adapter computes: masks, gradients, routing, merging, several adapters."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model

import neuron_specialization as ns
from neuron_specialization.adapter.routing import is_routed
from neuron_specialization.analysis.shapes import random_masks
from neuron_specialization.neurons.base_model import unwrap
from neuron_specialization.neurons.language_pairs import Routes

from .conftest import PAIRS, checkpoint_activations, make_batch, make_m2m100, make_masks, make_t5, zero_masked_rows

MODES = ["none", "delta", "low_rank", "full"]


def adapt(model, masks, **config):
    return get_peft_model(model, ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM", **config))


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients by the base model's own parameter names."""
    strip = ("base_model.model.", ".base_layer")
    named = {n.replace(strip[0], "").replace(strip[1], ""): p.grad for n, p in model.named_parameters()}
    return {name: grad for name, grad in named.items() if grad is not None}


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["plain", "gated"])
@pytest.mark.parametrize("pair", ["en-de", "fr-en"])
def test_masked_equals_zeroed_rows_with_all_gradients(make, pair):
    """`full` trains every base parameter: outputs and every gradient are those of a model with zeroed rows."""
    model = make().double()
    batch = make_batch(pad=model.config.pad_token_id)
    masks = make_masks(model)
    reference = zero_masked_rows(model, masks, pair)
    adapted = adapt(model, masks, trainable="full")
    expected = reference(**batch)
    expected.loss.backward()
    found = adapted(**batch, language_pairs=pair)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    expected, found = gradients(reference), gradients(adapted)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        masked = name.removesuffix(".weight")
        if masked in masks.rows:  # the reference still passes gradients into its zeroed rows
            gradient = gradient * masks.row(pair, masked)[:, None]
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["plain", "gated"])
def test_delta_acts_in_weight_space_under_the_mask(make):
    model = make().double()
    batch = make_batch(pad=model.config.pad_token_id)
    masks = make_masks(model)
    reference = copy.deepcopy(model)
    adapted = adapt(model, masks, trainable="delta", init_weights=True)
    deltas = {}
    with torch.no_grad():
        for name in masks.rows:
            delta = adapted.base_model.model.get_submodule(name).neuron_specialization_delta["default"]
            delta.normal_(std=0.1)
            deltas[name] = delta
            reference.get_submodule(name).weight += delta
    reference = zero_masked_rows(reference, masks, "en-de")
    expected = reference(**batch)
    expected.loss.backward()
    found = adapted(**batch, language_pairs="en-de")
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    for name, delta in deltas.items():
        gradient = reference.get_submodule(name).weight.grad * masks.row("en-de", name)[:, None]
        torch.testing.assert_close(delta.grad, gradient, rtol=1e-9, atol=1e-10)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("neuron_specialization_delta" in n for n in trained)


@pytest.mark.usefixtures("each_batch_size")
def test_with_mask_bias_masked_neurons_output_zero():
    model, batch = make_m2m100().double(), make_batch()
    masks = make_masks(model)
    reference = zero_masked_rows(model, masks, "en-de")
    with_constants = reference(**batch).logits
    with torch.no_grad():
        for name in masks.rows:
            reference.get_submodule(name).bias[~masks.row("en-de", name)] = 0
    expected = reference(**batch).logits
    adapted = adapt(model, masks, trainable="none", mask_bias=True)
    torch.testing.assert_close(adapted(**batch, language_pairs="en-de").logits, expected)
    assert not torch.allclose(expected, with_constants)


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["plain", "gated"])
def test_a_mixed_batch_equals_runs_of_one_pair(mode, make):
    model = make()
    batch = make_batch(pad=model.config.pad_token_id)
    adapted = adapt(model, make_masks(model), trainable=mode, init_weights=False).eval()
    mixed = adapted(**batch, language_pairs=PAIRS).logits
    ids = torch.tensor([adapted_pairs(adapted).index(pair) for pair in PAIRS])
    torch.testing.assert_close(adapted(**batch, language_pairs=ids).logits, mixed)
    for i, pair in enumerate(PAIRS):
        with ns.language_pair(adapted, pair):
            alone = adapted(**batch).logits[i]
        torch.testing.assert_close(mixed[i], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], adapted(**batch, language_pairs="fr-en").logits[0], atol=1e-3)


def adapted_pairs(adapted) -> list[str]:
    return adapted.peft_config["default"].language_pairs


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize(
    "options", [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": False}]
)
def test_generation_routes_each_sample_through_its_beams(options):
    model = make_m2m100()
    batch = make_batch()
    adapted = adapt(model, make_masks(model), init_weights=False).eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 8}
    mixed = adapted.generate(**inputs, **options, language_pairs=PAIRS)
    each = options.get("num_return_sequences", 1)
    for i, pair in enumerate(PAIRS):
        adapted.set_language_pair(pair)
        alone = adapted.generate(**inputs, **options)[i * each : (i + 1) * each]
        together = mixed[i * each : (i + 1) * each]
        width = min(alone.shape[1], together.shape[1])
        assert together[:, :width].equal(alone[:, :width])


def test_choice_of_the_pair():
    model = make_m2m100()
    batch = make_batch()
    adapted = adapt(model, make_masks(model), init_weights=False).eval()
    with pytest.raises(ValueError, match="several language pairs and none was chosen.*en-de, de-en, en-fr, fr-en"):
        adapted(**batch)
    by_call = adapted(**batch, language_pairs="en-fr").logits
    adapted.set_language_pair("en-fr")
    assert adapted(**batch).logits.equal(by_call)
    with ns.language_pair(adapted, "de-en"):
        assert not adapted(**batch).logits.equal(by_call)
        assert adapted(**batch, language_pairs=["en-fr"] * 4).logits.equal(by_call), "the call wins"
    assert adapted(**batch).logits.equal(by_call), "the pair set before is back"
    ns.set_language_pair(adapted, None)
    with pytest.raises(ValueError, match="none was chosen"):
        adapted(**batch)
    for say in (lambda: adapted(**batch, language_pairs="en-it"), lambda: adapted.set_language_pair("en-it")):
        with pytest.raises(ValueError, match="no language pair 'en-it'.*Known pairs: en-de"):
            say()
    with pytest.raises(ValueError, match="3 samples, but a batch of 4"):
        adapted(**batch, language_pairs=PAIRS[:3])
    with pytest.raises(ValueError, match="no neuron specialization adapter"):
        ns.set_language_pair(make_m2m100(), "en-de")


def test_an_only_pair_needs_no_saying():
    model = make_m2m100()
    masks = make_masks(model, ["en-de"])
    expected = zero_masked_rows(model, masks, "en-de")(**make_batch()).logits
    adapted = adapt(model, masks, trainable="none")
    torch.testing.assert_close(adapted(**make_batch()).logits, expected)


def test_default_pair_base_runs_the_untouched_base_inside_a_mixed_batch():
    model, batch = make_m2m100(), make_batch()
    base = model(**batch).logits
    adapted = adapt(model, make_masks(model), init_weights=False, default_pair="base").eval()
    mixed = adapted(**batch, language_pairs=["en-de", "en-it", "base", "fr-en"]).logits
    torch.testing.assert_close(mixed[1:3], base[1:3])
    torch.testing.assert_close(mixed[0], adapted(**batch, language_pairs="en-de").logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted(**batch).logits, base)
    ids = adapted(**batch, language_pairs=torch.tensor([0, -1, -1, 3])).logits
    torch.testing.assert_close(ids, mixed)


def test_zero_shot_pairs_are_composed():
    model, batch = make_m2m100(), make_batch()
    masks = make_masks(model)
    expected = zero_masked_rows(model, masks.compose("de-fr"), "de-fr")(**batch).logits
    adapted = adapt(model, masks, trainable="none")
    torch.testing.assert_close(adapted(**batch, language_pairs="de-fr").logits, expected)


@pytest.mark.parametrize("mode", ["none", "delta", "low_rank"])
def test_disabling_and_unloading_give_the_base_back(mode):
    model, batch = make_m2m100(), make_batch()
    base, weights = model(**batch).logits, copy.deepcopy(model.state_dict())
    adapted = adapt(model, make_masks(model), trainable=mode, init_weights=False).eval()
    adapted.set_language_pair("en-de")
    assert not adapted(**batch).logits.equal(base)
    with adapted.disable_adapter():
        assert adapted(**batch).logits.equal(base)
    unloaded = adapted.unload()
    assert unloaded(**batch).logits.equal(base)
    assert all(unloaded.state_dict()[name].equal(weight) for name, weight in weights.items())
    assert "generate" not in vars(unloaded) and not unloaded._forward_pre_hooks


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_bias", [False, True])
def test_merging_one_pair(mode, mask_bias):
    model, batch = make_m2m100(), make_batch()
    adapted = adapt(model, make_masks(model), trainable=mode, init_weights=False, mask_bias=mask_bias).eval()
    expected = adapted(**batch, language_pairs="en-fr").logits
    with pytest.raises(ValueError, match="none was chosen"):
        adapted.merge_adapter()
    adapted.set_language_pair("en-fr")
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    assert adapted(**batch, language_pairs="en-fr").logits.equal(expected), "unmerging is exact"
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_adapter_names_per_sample_with_pairs_and_beams():
    model, batch = make_m2m100(), make_batch()
    adapted = adapt(model, make_masks(model), init_weights=False)
    other = ns.NeuronSpecializationConfig(
        masks=make_masks(make_m2m100(), seed=7), init_weights=False, task_type="SEQ_2_SEQ_LM"
    )
    adapted.add_adapter("other", other)
    adapted.eval()
    names = ["default", "__base__", "other", "default"]
    mixed = adapted(**batch, adapter_names=names, language_pairs=PAIRS).logits
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "max_new_tokens": 6}
    beams = adapted.generate(**inputs, num_beams=3, adapter_names=names, language_pairs=PAIRS)
    for i, (name, pair) in enumerate(zip(names, PAIRS, strict=True)):
        if name == "__base__":
            with adapted.disable_adapter():
                alone, generated = adapted(**batch).logits, adapted.generate(**inputs, num_beams=3)
        else:
            adapted.set_adapter(name)
            alone = adapted(**batch, language_pairs=pair).logits
            generated = adapted.generate(**inputs, num_beams=3, language_pairs=pair)
        torch.testing.assert_close(mixed[i], alone[i], rtol=1e-4, atol=1e-5)
        width = min(beams.shape[1], generated.shape[1])
        assert beams[i, :width].equal(generated[i, :width])
    adapted.set_adapter("default")
    one = {"input_ids": batch["input_ids"][:1], "num_beams": 3, "language_pairs": "en-de", "max_new_tokens": 5}
    with_name = adapted.generate(**one, adapter_names=["other"])
    adapted.set_adapter("other")
    assert with_name.equal(adapted.generate(**one)), "every beam of an only sample runs its adapter"
    with pytest.raises(ValueError, match="non-existing adapter.*missing"):
        adapted(**batch, adapter_names=["missing"] * 4)
    for run in (
        lambda names: adapted(**batch, adapter_names=names),
        lambda names: adapted.generate(**inputs, adapter_names=names),
    ):
        with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 4"):
            run(["default", "__base__"])


def test_several_adapters_are_switched_and_deleted():
    model, batch = make_m2m100(), make_batch()
    adapted = adapt(model, make_masks(model), init_weights=False).eval()
    first = adapted(**batch, language_pairs="en-de").logits
    italian = ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100(), ["en-it"]), task_type="SEQ_2_SEQ_LM")
    adapted.add_adapter("italian", italian)
    assert adapted(**batch, language_pairs="en-de").logits.equal(first)
    adapted.set_adapter("italian")
    with pytest.raises(ValueError, match="Known pairs: en-it"):
        adapted(**batch, language_pairs="en-de")
    adapted(**batch)  # its only pair
    adapted.set_adapter("default")
    adapted.delete_adapter("italian")
    assert adapted(**batch, language_pairs="en-de").logits.equal(first)
    with pytest.raises(ValueError, match="no language pair 'en-it'"):
        adapted(**batch, language_pairs="en-it")


@pytest.mark.parametrize("injected_by", ["peft", "transformers"])
def test_a_model_whose_last_adapter_is_deleted_is_not_routed(injected_by):
    model, batch = make_m2m100(), make_batch()
    expected = model(**batch).logits
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), init_weights=False, task_type="SEQ_2_SEQ_LM")
    if injected_by == "peft":
        adapted = get_peft_model(model, config).eval()
    else:
        model.add_adapter(config, "default")
        adapted = model
    assert is_routed(adapted)
    adapted.delete_adapter("default")
    assert not is_routed(adapted)
    base = unwrap(adapted)  # PEFT's own wrapper does not run without an adapter
    assert base(**batch).logits.equal(expected)
    with pytest.raises(ValueError, match="en-de.*adapters were deleted"):
        base(**batch, language_pairs="en-de")


def test_status_counts_mask_only_adapters():
    model = make_m2m100()
    adapted = adapt(model, make_masks(model), trainable="none")
    layers = adapted.get_layer_status()
    assert [layer.name for layer in layers] == [f"model.{block.name}" for block in ns.find_ffn_blocks(make_m2m100())]
    assert {(*layer.active_adapters, *layer.available_adapters) for layer in layers} == {("default", "default")}
    status = adapted.get_model_status()
    assert status.available_adapters == ["default"] and status.num_adapter_layers == 4
    assert status.trainable_params == 0


def test_full_refuses_what_it_cannot_keep():
    model = make_m2m100()
    adapted = adapt(model, make_masks(model), trainable="full")
    with pytest.raises(ValueError, match="trainable='full'.*no other adapter"):
        adapted.add_adapter("second", ns.NeuronSpecializationConfig(task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match="already trains and saves every parameter"):
        ns.NeuronSpecializationConfig(trainable="full", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="untouched base"):
        ns.NeuronSpecializationConfig(trainable="full", default_pair="base")


def test_masks_made_for_another_model_are_refused_and_nothing_is_replaced():
    masks = make_masks(make_m2m100(encoder_ffn_dim=24))
    model = make_m2m100()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="made for another model.*d_ff.*identify masks on this one"):
        adapt(model, masks)
    with pytest.raises(ValueError, match="made for another model.*m2m_100.*t5"):
        adapt(make_t5(), masks)
    assert [type(m) for m in model.modules()] == before
    assert "generate" not in vars(model) and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainable": "lora"}, "trainable must be one of 'none', 'delta', 'low_rank', 'full'"),
        ({"execution": "fast"}, "execution must be one of"),
        ({"source_tag": "both"}, "source_tag says"),
        ({"r": 0}, "r, the rank of trainable='low_rank', must be a positive integer"),
        ({"language_pairs": ["en_de"]}, "Expected a language pair such as 'en-de'"),
        ({"language_pairs": ["en-de", "en-de"]}, "repeated: en-de"),
        ({"default_pair": "en-de"}, "no language pair 'en-de'"),
        ({"language_token_ids": {"en": "eng_Latn"}}, "map codes to token ids, got .*eng.*ns.language_token_ids"),
        ({"format_version": 7}, "format version 7"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ns.NeuronSpecializationConfig(**config)


@pytest.mark.usefixtures("each_batch_size")
def test_copies_and_pickles_route_by_themselves():
    model, batch = make_m2m100(), make_batch()
    adapted = adapt(model, make_masks(model), init_weights=False).eval()
    adapted.set_language_pair("en-de")
    german = adapted(**batch).logits
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert other(**batch).logits.equal(german)
        other.set_language_pair("fr-en")
        assert not other(**batch).logits.equal(german)
        inputs = {"input_ids": batch["input_ids"], "max_new_tokens": 5}
        with ns.language_pair(other, "en-de"):
            assert other.generate(**inputs).equal(adapted.generate(**inputs))
        assert adapted(**batch).logits.equal(german), "the original is untouched"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_under_the_same_masks(use_reentrant):
    model, batch = make_m2m100(), make_batch()
    adapted = adapt(model, make_masks(model), init_weights=False).train()
    adapted(**batch, language_pairs=PAIRS).loss.backward()
    expected = gradients(adapted)
    adapted.zero_grad()
    checkpoint_activations(adapted.base_model.model, use_reentrant)
    adapted.enable_input_require_grads()
    runs = []
    fc1 = adapted.get_base_model().model.encoder.layers[0].fc1
    fc1.register_forward_hook(lambda module, args, output: runs.append(1))
    adapted(**batch, language_pairs=PAIRS).loss.backward()
    assert len(runs) == 2, "the layer ran again for the backward pass"
    for name, gradient in gradients(adapted).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_any_linear_layer_may_be_masked():
    model = make_m2m100()
    config = ns.NeuronSpecializationConfig(target_modules=["q_proj"], init_weights=False, task_type="SEQ_2_SEQ_LM")
    base = model(**make_batch()).logits
    adapted = get_peft_model(model, config)
    assert not adapted(**make_batch()).logits.equal(base)


def test_any_linear_layer_follows_the_pairs_of_its_own_stack(tmp_path):
    """A composed pair has X→pivot's row in the encoder, in attention too."""
    pairs, name = ["de-en", "en-fr"], "model.encoder.layers.0.self_attn.q_proj"
    config = {"language_pairs": pairs, "init_weights": False, "trainable": "none", "task_type": "SEQ_2_SEQ_LM"}
    config["target_modules"] = [name, "model.decoder.layers.0.encoder_attn.q_proj"]
    adapted = get_peft_model(make_m2m100(), ns.NeuronSpecializationConfig(**config)).eval()
    assert list(adapted.peft_config["default"].stacks.values()) == ["encoder", "decoder"]
    states = [
        adapted.get_encoder()(make_batch()["input_ids"], language_pairs=pair).last_hidden_state
        for pair in ("de-fr", "de-en", "en-fr")
    ]
    assert states[0].equal(states[1]) and not states[0].equal(states[2])
    adapted.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_m2m100(), str(tmp_path)).eval()
    again = loaded.get_encoder()(make_batch()["input_ids"], language_pairs="de-fr").last_hidden_state
    assert again.equal(states[0])


def test_recording_an_adapted_model_counts_under_its_masks():
    model = make_m2m100()
    masks = make_masks(model)
    adapted = adapt(model, masks, trainable="none", mask_bias=True)
    batch = {**make_batch(), "language_pairs": ["en-de"]}
    counts = ns.record_activations(adapted, {"en-de": [batch]}, progress=False)
    for name, count in counts.counts.items():
        assert not count[0][~masks.row("en-de", name)].any()
        assert count[0].any()


class Int8Linear(torch.nn.Module):
    """A weight-only quantized linear as such libraries make them: no `weight` that could be used as it is."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight * self.scale, self.bias)


class Int8Tensor(torch.Tensor):
    """The same in the manner of torchao: a plain linear whose weight is a tensor of another class."""

    @staticmethod
    def __new__(cls, weight, scale=None):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.float32)

    def __init__(self, weight, scale=None):
        self.scale = weight.detach().abs().amax(1, keepdim=True) / 127 if scale is None else scale
        self.quantized = (weight.detach() / self.scale).round().to(torch.int8) if scale is None else weight

    def whole(self):
        return self.quantized * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].quantized, args[0].scale)
        if function in (torch.ops.aten.t.default, torch.ops.aten.mm.default):
            return function(*(arg.whole() if isinstance(arg, cls) else arg for arg in args))
        raise NotImplementedError(f"{function} on an int8 weight")


def quantized(kind: str):
    """A model whose FFNs hold int8 weights, in modules or in tensors of their own, and a dense one with the same
    numbers."""
    model, dense = make_m2m100(), make_m2m100()
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    if kind == "modules":
        for layer in layers:
            layer.fc1, layer.fc2 = Int8Linear(layer.fc1), Int8Linear(layer.fc2)
    else:
        for linear in [part for layer in layers for part in (layer.fc1, layer.fc2)]:
            linear.weight = torch.nn.Parameter(Int8Tensor(linear.weight), requires_grad=False)
    with torch.no_grad():
        for block in ns.find_ffn_blocks(model):
            for name, part in ((block.name, block.up), (block.name.replace("fc1", "fc2"), block.down)):
                weight = part.qweight * part.scale if kind == "modules" else part.weight.whole()
                dense.get_submodule(name).weight.copy_(weight)
    return model, dense


@pytest.mark.parametrize("kind", ["modules", "tensors"])
@pytest.mark.parametrize("mode", ["none", "delta", "low_rank"])
def test_quantized_projections_run_on_the_masked_path(mode, kind):
    masks, batch = make_masks(make_m2m100()), make_batch()
    model, dense = quantized(kind)
    assert len(ns.find_ffn_blocks(model)) == 4
    adapted, expected = (adapt(each, masks, trainable=mode).eval() for each in (model, dense))
    with pytest.warns(UserWarning, match="run masked, not compact, because of weights that are not plain tensors"):
        alone = adapted(**batch, language_pairs="en-de").logits
    found = adapted(**batch, language_pairs=PAIRS)
    mixed = expected(**batch, language_pairs=PAIRS)
    torch.testing.assert_close(found.logits, mixed.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, expected(**batch, language_pairs="en-de").logits, rtol=1e-4, atol=1e-5)
    if mode != "none":
        found.loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        with pytest.raises(ValueError, match="load the base model unquantized to merge"):
            adapted.set_language_pair("en-de")
            adapted.merge_adapter()


@pytest.mark.parametrize("mode", ["delta", "low_rank", "full"])
def test_bf16_autocast_trains_in_float32_under_the_masks(mode):
    model = make_m2m100()
    masks = make_masks(model)
    adapted = adapt(model, masks, trainable=mode).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adapted(**make_batch(), language_pairs=PAIRS).loss
    loss.backward()
    exact = adapt(make_m2m100(), masks, trainable=mode).train()(**make_batch(), language_pairs=PAIRS).loss
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name


def test_a_bf16_base_keeps_its_type_and_its_delta_is_float32():
    model = make_m2m100().to(torch.bfloat16)
    adapted = adapt(model, make_masks(make_m2m100()), trainable="delta", init_weights=False)
    assert adapted(**make_batch(), language_pairs=PAIRS).logits.dtype == torch.bfloat16
    deltas = [p.dtype for n, p in adapted.named_parameters() if "delta" in n]
    assert set(deltas) == {torch.float32}


def test_many_directions_in_a_batch_take_no_more_operations_than_a_few():
    """Rows are gathered; a loop over directions or samples would show as more operations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    codes = [f"l{i}" for i in range(64)]
    pairs = [f"{code}-en" for code in codes]
    model = make_m2m100()
    adapted = adapt(model, random_masks(model, Routes.per_pair(pairs), 0.7), trainable="delta").eval()
    calls = {}
    for directions in (8, 64):
        with torch.no_grad(), Counter() as counter:
            adapted(**make_batch(64), language_pairs=[pairs[i % directions] for i in range(64)])
        calls[directions] = counter.calls
    assert calls[64] == calls[8]
