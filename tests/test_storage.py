"""Saving and loading: nothing that was trained is lost, and what is damaged is refused."""

import json
import os
import warnings

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import neuron_specialization as ns
from neuron_specialization.adapter.active import active_config
from neuron_specialization.adapter.pair_resolver import resolver_of
from neuron_specialization.analysis.shapes import random_masks
from neuron_specialization.neurons import adapter_file
from neuron_specialization.neurons.language_pairs import Routes

from .conftest import PAIRS, make_batch, make_m2m100, make_masks

MODES = ["none", "delta", "low_rank", "full"]
INPUTS = {
    "input_ids": make_batch()["input_ids"],
    "attention_mask": make_batch()["attention_mask"],
    "max_new_tokens": 8,
}


@pytest.fixture
def base_directory(tmp_path):
    make_m2m100().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def trained(base_directory, mode, **config):
    """An adapted model after one real update."""
    model = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    masks = make_masks(model)
    adapted = get_peft_model(
        model, ns.NeuronSpecializationConfig(masks=masks, trainable=mode, task_type="SEQ_2_SEQ_LM", **config)
    )
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=0.05)
        adapted(**make_batch(), language_pairs=PAIRS).loss.backward()
        optimizer.step()
    return adapted.eval()


def generate(model, pairs=PAIRS):
    return model.generate(**INPUTS, num_beams=2, language_pairs=pairs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_what_is_reloaded_generates_the_same_tokens(base_directory, tmp_path, mode, safe):
    adapted = trained(base_directory, mode)
    expected = generate(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"), safe_serialization=safe)
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    untrained = base.generate(**INPUTS, num_beams=2)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert generate(loaded).equal(expected)
    assert not expected.shape == untrained.shape or not expected.equal(untrained)
    auto = AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))
    assert generate(auto).equal(expected)
    ns.save_adapter(loaded, tmp_path / "again")
    again = AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "again"), low_cpu_mem_usage=True)
    assert generate(again).equal(expected)


def test_full_stores_tied_tensors_once_and_delta_stores_no_base(base_directory, tmp_path):
    for mode in ("full", "delta"):
        trained(base_directory, mode).save_pretrained(str(tmp_path / mode))
    full = load_file(tmp_path / "full" / "adapter_model.safetensors")
    parameters = dict(make_m2m100().named_parameters())
    masks = [key for key in full if key.endswith("neuron_specialization_mask")]
    assert len(full) == len(parameters) + len(masks)
    assert not any("lm_head" in key for key in full), "the output embedding is tied to the input's"
    delta = load_file(tmp_path / "delta" / "adapter_model.safetensors")
    assert all("neuron_specialization_" in key for key in delta) and len(delta) == 2 * len(masks)


def test_full_loads_the_trained_base(base_directory, tmp_path):
    adapted = trained(base_directory, "full")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))
    with adapted.disable_adapter(), loaded.disable_adapter():
        torch.testing.assert_close(loaded(**make_batch()).logits, adapted(**make_batch()).logits)
    head, shared = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert head.data_ptr() == shared.data_ptr()


def test_a_trained_base_is_loaded_whole_without_copying_it(base_directory, tmp_path):
    """Its tied weights are in the file once, under one of their names, and in the file's dtype."""
    adapted = trained(base_directory, "full")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    for dtype in (torch.float32, torch.bfloat16):
        loaded = [
            PeftModel.from_pretrained(
                AutoModelForSeq2SeqLM.from_pretrained(base_directory, dtype=dtype),
                str(tmp_path / "adapter"),
                low_cpu_mem_usage=low,
            ).eval()
            for low in (False, True)
        ]
        assert {p.dtype for p in loaded[1].parameters()} == {dtype}
        assert loaded[1].get_output_embeddings().weight is loaded[1].get_input_embeddings().weight
        copied, assigned = (model(**make_batch(), language_pairs=PAIRS).logits for model in loaded)
        assert assigned.equal(copied)


def test_a_new_adapter_from_a_config_that_lost_its_masks_says_so(base_directory, tmp_path):
    """PEFT's own class reads a config without saying where from, so that masks cannot follow."""
    trained(base_directory, "none").save_pretrained(str(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match="without its masks.*NeuronSpecializationConfig.from_pretrained"):
        dense = get_peft_model(make_m2m100(), PeftConfig.from_pretrained(str(tmp_path / "adapter"))).eval()
    assert dense(**make_batch(), language_pairs=PAIRS).logits.allclose(make_m2m100()(**make_batch()).logits)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "This config was read")
        PeftModel.from_pretrained(make_m2m100(), str(tmp_path / "adapter"))


def test_masks_that_keep_nothing_are_refused_before_they_are_trained(model, masks):
    """Their adapter could be saved, and not loaded again."""
    name = next(iter(masks.rows))
    masks.rows[name][1] = False
    with pytest.raises(ValueError, match=rf"{name}: rows \[1\] keep no neuron"):
        get_peft_model(model, ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM"))
    assert not any("neuron_specialization" in key for key in model.state_dict())


def test_a_mask_directory_is_an_adapter(base_directory, tmp_path):
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    masks = make_masks(base)
    masks.save_pretrained(tmp_path / "masks")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "masks"))
    by_path = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(base_directory),
        ns.NeuronSpecializationConfig(masks=str(tmp_path / "masks"), trainable="none", task_type="SEQ_2_SEQ_LM"),
    )
    assert generate(loaded).equal(generate(by_path))
    loaded.save_pretrained(str(tmp_path / "again"))
    again = ns.NeuronMasks.from_pretrained(tmp_path / "again")
    assert all(again.rows[name].equal(rows) for name, rows in masks.rows.items())
    assert again.selector == masks.selector


def test_the_config_holds_no_masks_and_survives(base_directory, tmp_path):
    adapted = trained(base_directory, "delta", default_pair="base", language_token_ids={"en": 4, "de": 5})
    adapted.save_pretrained(str(tmp_path / "adapter"))
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "masks" not in stored
    assert stored["language_pairs"] == PAIRS and stored["routes"] == [[i, i] for i in range(len(PAIRS))]
    config = ns.NeuronSpecializationConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.default_pair == "base" and config.language_token_ids == {"en": 4, "de": 5}


def test_trained_tokens_and_whole_modules_are_kept(base_directory, tmp_path):
    adapted = trained(base_directory, "delta", modules_to_save=["layer_norm"], trainable_token_indices=[4, 5])
    expected = adapted(**make_batch(), language_pairs=PAIRS).logits
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory).state_dict()
    norm = "model.encoder.layer_norm.weight"
    assert not tensors[f"base_model.model.{norm}"].equal(base[norm]), "it was trained"
    (tokens,) = (value for key, value in tensors.items() if key.endswith("trainable_tokens_delta"))
    assert tokens.shape == (2, 16) and not tokens.equal(base["model.shared.weight"][[4, 5]])
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(**make_batch(), language_pairs=PAIRS).logits, expected)
    by_transformers = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(by_transformers(**make_batch(), language_pairs=PAIRS).logits, expected)


def damage(directory, change, fix_digest):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if fix_digest:
        config = json.loads((directory / "adapter_config.json").read_text())
        config["weights_digest"] = adapter_file.file_digest(path)
        (directory / "adapter_config.json").write_text(json.dumps(config))


def first(tensors, suffix):
    return next(key for key in tensors if key.endswith(suffix))


@pytest.mark.parametrize(
    ("change", "fix_digest", "message"),
    [
        (lambda t: t.pop(first(t, "_delta")), True, "missing .*delta.*Nothing was loaded"),
        (lambda t: t.update({"base_model.model.lm_head.extra": torch.ones(1)}), True, "unknown .*extra"),
        (lambda t: t.update({first(t, "_delta"): torch.ones(3, 3)}), True, r"expected .*got torch.float32 \[3, 3\]"),
        (lambda t: t[first(t, "_mask")].zero_(), True, "keep no neuron"),
        (lambda t: t[first(t, "_mask")].fill_(255), True, "padding bits"),
        (lambda t: t[first(t, "_delta")].add_(1), False, "save was interrupted"),
    ],
)
def test_damaged_adapters_are_refused(base_directory, tmp_path, change, fix_digest, message):
    trained(base_directory, "delta").save_pretrained(str(tmp_path / "adapter"))
    damage(tmp_path / "adapter", change, fix_digest)
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))


def test_missing_weights_are_refused(base_directory, tmp_path):
    trained(base_directory, "delta").save_pretrained(str(tmp_path / "adapter"))
    os.remove(tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="weights in .* are missing"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))


def test_a_save_that_fails_leaves_the_old_adapter(base_directory, tmp_path, monkeypatch):
    adapted = trained(base_directory, "delta")
    ns.save_adapter(adapted, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(ns.NeuronSpecializationConfig, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        ns.save_adapter(adapted, tmp_path / "adapter")
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    ("change", "fix_digest", "message"),
    [
        (lambda t: t.pop(first(t, "_delta")), True, "missing .*delta.*Nothing was loaded"),
        (lambda t: t.update({"base_model.model.lm_head.extra": torch.ones(1)}), True, "unknown .*extra"),
        (lambda t: t[first(t, "_mask")].zero_(), True, "keep no neuron"),
        (lambda t: t[first(t, "_delta")].add_(1), False, "save was interrupted"),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_damaged_adapters_are_refused_by_transformers_too(
    base_directory, tmp_path, change, fix_digest, message, second
):
    trained(base_directory, "delta").save_pretrained(str(tmp_path / "adapter"))
    model = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    if second:
        model.load_adapter(str(tmp_path / "adapter"), adapter_name="first")
    before = [(name, type(module)) for name, module in model.named_modules()]
    expected = model(**make_batch(), **({"language_pairs": PAIRS} if second else {})).logits
    damage(tmp_path / "adapter", change, fix_digest)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(tmp_path / "adapter"), adapter_name="damaged")
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    if second:
        model.set_adapter("first")
        assert model(**make_batch(), language_pairs=PAIRS).logits.equal(expected)
    else:
        assert model(**make_batch()).logits.equal(expected) and not model._hf_peft_config_loaded
        assert "generate" not in vars(model) and "_load_pretrained_model" not in vars(model)


def test_a_config_that_is_no_json_is_refused_by_transformers_too(base_directory, tmp_path):
    trained(base_directory, "delta").save_pretrained(str(tmp_path / "adapter"))
    os.truncate(tmp_path / "adapter" / "adapter_config.json", 99)
    with pytest.raises(ValueError, match="adapter_config.json is damaged: it is no JSON"):
        AutoModelForSeq2SeqLM.from_pretrained(base_directory).load_adapter(str(tmp_path / "adapter"))


def test_other_adapters_load_beside_ours(base_directory, tmp_path):
    """LoRA on attention, injected by transformers into the model that already runs under our masks."""
    lora = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base_directory), lora_on_attention())
    lora.save_pretrained(str(tmp_path / "lora"))
    model = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    masks = make_masks(model)
    model.add_adapter(ns.NeuronSpecializationConfig(masks=masks, trainable="none"), adapter_name="masks")
    model.eval()
    masked = model(**make_batch(), language_pairs=PAIRS).logits
    model.load_adapter(str(tmp_path / "lora"), adapter_name="lora")
    model.set_adapter(["masks", "lora"])
    both = model(**make_batch(), language_pairs=PAIRS).logits
    assert not torch.allclose(both, masked)
    reference = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    reference.load_adapter(str(tmp_path / "lora"), adapter_name="lora")
    assert not torch.allclose(both, reference(**make_batch()).logits)
    for name in masks.rows:
        with torch.no_grad():
            reference.get_submodule(name).weight[~masks.row("en-de", name)] = 0
    torch.testing.assert_close(both[0], reference(**make_batch()).logits[0], rtol=1e-4, atol=1e-5)
    model.set_adapter(["lora", "masks"])
    assert active_config(model) is model.peft_config["masks"], "the one of ours, wherever it stands"


def lora_on_attention() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")


@pytest.mark.parametrize("mode", ["delta", "full"])
def test_a_resized_vocabulary_travels_with_the_adapter(base_directory, tmp_path, mode):
    model = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    masks = make_masks(model)
    model.resize_token_embeddings(72)
    config = {"trainable": mode, "init_weights": False, "task_type": "SEQ_2_SEQ_LM"}
    adapted = get_peft_model(model, ns.NeuronSpecializationConfig(masks=masks, **config)).eval()
    expected = adapted(**make_batch(), language_pairs=PAIRS).logits
    assert expected.shape[-1] == 72
    adapted.save_pretrained(str(tmp_path / "adapter"))
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    base.resize_token_embeddings(72)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(**make_batch(), language_pairs=PAIRS).logits, expected)


def test_all_of_nllbs_directions_fit_into_a_small_file(tmp_path):
    """202 languages, factorized: 40,602 directions of 24 blocks with 4,096 neurons."""
    languages = [f"lang_{i:03d}" for i in range(202)]
    model = make_m2m100(layers=12, d_model=8, encoder_ffn_dim=4096, decoder_ffn_dim=4096)
    masks = random_masks(model, Routes(languages, languages), 0.8)
    first, *_, last = masks.rows
    assert len(masks.language_pairs) == 202 * 201 == 40602
    masks.save_pretrained(tmp_path / "nllb")
    assert sum(file.stat().st_size for file in (tmp_path / "nllb").iterdir()) <= 2.6e6
    loaded = ns.NeuronMasks.from_pretrained(tmp_path / "nllb")
    assert len(loaded.language_pairs) == 40602
    assert loaded.row("lang_007-lang_201", first).equal(masks.rows[first][7])
    assert loaded.row("lang_007-lang_201", last).equal(masks.rows[last][201])
    config = ns.NeuronSpecializationConfig.from_pretrained(str(tmp_path / "nllb"))
    resolver = resolver_of(config)
    assert resolver.rows.shape == (40602, 2) and resolver.route("lang_003-lang_004") == (3, 4)
    assert resolver.rows[resolver.pair_id("lang_003-lang_004")].tolist() == [3, 4]


def test_masks_bring_their_language_tokens_base_and_pairs_into_the_config(base_directory, tmp_path):
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    ids = {"en": 4, "de": 5, "fr": 6}
    batches = {pair: [make_batch(seed=i)] for i, pair in enumerate(PAIRS)}
    counts = ns.record_activations(base, batches, progress=False, language_token_ids=ids)
    counts.save(tmp_path / "counts")
    counts = ns.ActivationCounts.load(tmp_path / "counts") + counts.load(tmp_path / "counts")
    ns.CumulativeThreshold(0.6).select(counts).save_pretrained(tmp_path / "masks")
    config = ns.NeuronSpecializationConfig(masks=tmp_path / "masks")
    assert config.language_token_ids == ids and config.base_model_name_or_path == base_directory
    assert config.language_pairs == PAIRS
    own = ns.NeuronSpecializationConfig(masks=tmp_path / "masks", language_token_ids={"en": 7, "de": 8})
    assert own.language_token_ids == {"en": 7, "de": 8}
    with pytest.raises(ValueError, match="masks list the language pairs.*language_pairs says"):
        ns.NeuronSpecializationConfig(masks=tmp_path / "masks", language_pairs=["en-de"])
    adapted = AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "masks"))  # finds its base
    batch = make_batch()
    batch["input_ids"][:, 0] = torch.tensor([4, 5, 4, 6])
    decoder = torch.tensor([[2, 5], [2, 4], [2, 6], [2, 4]])
    inputs = {"input_ids": batch["input_ids"].clamp(max=59), "decoder_input_ids": decoder}
    inputs["input_ids"][:, 1:] = 20
    assert adapted(**inputs).logits.equal(adapted(**inputs, language_pairs=PAIRS).logits), "read from the tokens"
    other = ns.record_activations(base, batches, progress=False, language_token_ids={"en": 5})
    with pytest.raises(ValueError, match="different tokens for a language"):
        counts + other


def test_saving_in_the_other_format_replaces_the_old_weights(base_directory, tmp_path):
    for safe in (True, False, True):
        adapted = trained(base_directory, "delta", init_weights=not safe)
        adapted.save_pretrained(str(tmp_path / "adapter"), safe_serialization=safe)
        loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))
        expected = adapted(**make_batch(), language_pairs=PAIRS).logits
        torch.testing.assert_close(loaded(**make_batch(), language_pairs=PAIRS).logits, expected)


def test_the_older_weights_are_told_without_trusting_the_clock(base_directory, tmp_path):
    """Files from another machine may be of the future."""
    directory = tmp_path / "adapter"
    trained(base_directory, "delta").save_pretrained(str(directory))
    os.utime(directory / "adapter_model.safetensors", (4e9, 4e9))
    adapted = trained(base_directory, "delta", init_weights=False)
    adapted.save_pretrained(str(directory), safe_serialization=False)
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(str(directory))
    expected = adapted(**make_batch(), language_pairs=PAIRS).logits
    torch.testing.assert_close(loaded(**make_batch(), language_pairs=PAIRS).logits, expected)


def test_what_transformers_saves_twice_into_one_directory_is_the_second(base_directory, tmp_path):
    for seed in (0, 1):
        model = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
        masks = make_masks(model, seed=seed)
        model.add_adapter(ns.NeuronSpecializationConfig(masks=masks, trainable="none"))
        model.eval().save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    loaded.load_adapter(str(tmp_path / "adapter"))
    call = {**make_batch(), "language_pairs": PAIRS}
    assert loaded(**call).logits.equal(model(**call).logits)


def test_masks_alone_do_not_overwrite_the_base(base_directory, tmp_path):
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    make_masks(base).save_pretrained(tmp_path / "adapter")
    head = {"base_model.model.lm_head.weight": torch.ones(60, 16)}
    damage(tmp_path / "adapter", lambda tensors: tensors.update(head), fix_digest=True)
    with pytest.raises(ValueError, match="unknown .*lm_head.weight.*Nothing was loaded"):
        PeftModel.from_pretrained(base, str(tmp_path / "adapter"))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_another_checkpoint_of_the_same_shape_is_told(base_directory, tmp_path, cast, recwarn):
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    make_masks(base).save_pretrained(tmp_path / "masks")
    PeftModel.from_pretrained(base.to(cast), str(tmp_path / "masks"))
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]
    other = make_m2m100()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.warns(UserWarning, match="identified on a model of this architecture with other weights"):
        PeftModel.from_pretrained(other, str(tmp_path / "masks"))


def test_an_edited_card_of_a_named_adapter_stays(base_directory, tmp_path):
    model = trained(base_directory, "delta")
    other = ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100()), task_type="SEQ_2_SEQ_LM")
    model.add_adapter("other", other)
    ns.save_adapter(model, tmp_path / "both")
    card = tmp_path / "both" / "other" / "README.md"
    card.write_text(card.read_text() + "\nNot for court rooms.\n")
    ns.save_adapter(model, tmp_path / "both")
    assert "Not for court rooms." in card.read_text()
    assert "Not for court rooms." not in (tmp_path / "both" / "README.md").read_text()
    masks = ns.NeuronMasks.from_pretrained(tmp_path / "both", subfolder="other")
    assert all(rows.equal(other.masks.rows[name]) for name, rows in masks.rows.items())


def test_only_the_main_process_saves(base_directory, tmp_path):
    model = trained(base_directory, "delta")
    ns.save_adapter(model, tmp_path / "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    (tmp_path / "adapter" / ".neuron_specialization_partial").mkdir()  # that the main process is writing
    ns.save_adapter(model, tmp_path / "adapter", is_main_process=False)
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "adapter" / ".neuron_specialization_partial").is_dir(), "and go on to write"


def test_an_adapter_made_without_masks_is_read_back(base_directory, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    config = ns.NeuronSpecializationConfig(language_pairs=["en-de"], task_type="SEQ_2_SEQ_LM")
    get_peft_model(model, config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    assert stored["selector"] == {}
    path.write_text(json.dumps({**stored, "selector": None}))  # as releases before this one saved it
    masks = ns.NeuronMasks.from_pretrained(tmp_path)
    assert masks.language_pairs == ["en-de"] and all(rows.all() for rows in masks.rows.values())
    assert masks.selector == {}


def test_a_new_adapter_from_the_config_of_another_has_its_masks(base_directory, tmp_path):
    masks = trained(base_directory, "delta").peft_config["default"].masks
    trained(base_directory, "delta").save_pretrained(tmp_path)
    config = ns.NeuronSpecializationConfig.from_pretrained(str(tmp_path))
    adapted = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base_directory), config)
    adapted.save_pretrained(tmp_path / "again")
    again = ns.NeuronMasks.from_pretrained(tmp_path / "again")
    assert all(rows.equal(masks.rows[name]) for name, rows in again.rows.items())
    delta = {key: value for key, value in load_file(tmp_path / "again" / "adapter_model.safetensors").items()}
    assert not any(value.any() for key, value in delta.items() if key.endswith("delta")), "nothing is trained yet"


def test_a_copy_on_another_gpu_is_refused(base_directory):
    model = trained(base_directory, "none")
    model.base_model = model.base_model._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="accelerate launch"):
        model(**make_batch(), language_pairs=PAIRS)
