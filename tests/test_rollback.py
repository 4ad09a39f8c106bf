"""An adapter that is refused leaves the model exactly as it was, on every route."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

import neuron_specialization as ns
from neuron_specialization.neurons import adapter_file

from .conftest import PAIRS, make_batch, make_m2m100, make_masks


def config(masks, **changes):
    return ns.NeuronSpecializationConfig(**{"masks": masks, "task_type": "SEQ_2_SEQ_LM", **changes})


def describe(model, **call):
    """Everything of a model that a refused adapter might change."""
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()],
        "logits": model(**make_batch(), **call).logits,
    }


def assert_same(found, expected):
    assert found.pop("logits").equal(expected.pop("logits"))
    assert found == expected


REFUSED = {
    "a target without masks": ({"target_modules": ["fc1", "fc2"]}, ValueError, "fc2, but the masks have no row"),
    "a target that is no linear layer": ({"target_modules": ["fc1", "layer_norm"]}, TypeError, "linear layers only"),
    "a token outside the vocabulary": ({"trainable_token_indices": [999]}, Exception, "out of (range|bounds)"),
    "an absurd rank": ({"trainable": "low_rank", "r": 200_000_000}, ValueError, "r=200000000 is larger than both"),
}


@pytest.fixture(params=REFUSED.values(), ids=REFUSED)
def refused(request):
    return request.param


@pytest.mark.parametrize("by_transformers", [False, True], ids=["peft", "transformers"])
def test_a_refused_first_adapter_leaves_the_base(refused, by_transformers):
    changes, error, message = refused
    model = make_m2m100()
    masks = make_masks(model)
    before = describe(model)
    with pytest.raises(error, match=message):
        if by_transformers:
            model.add_adapter(config(masks, **changes))
        else:
            get_peft_model(model, config(masks, **changes))
    assert_same(describe(model), before)
    right = config(masks, init_weights=False)
    adapted = get_peft_model(model, right).eval()
    expected = get_peft_model(make_m2m100(), config(masks)).eval()
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(dict(adapted.named_parameters())[name])
    call = {**make_batch(), "language_pairs": PAIRS}
    assert adapted(**call).logits.equal(expected(**call).logits)


@pytest.mark.parametrize("by_transformers", [False, True], ids=["peft", "transformers"])
def test_a_refused_second_adapter_leaves_the_first(refused, by_transformers, tmp_path):
    changes, error, message = refused
    model = make_m2m100()
    masks = make_masks(model)
    if by_transformers:
        model.add_adapter(config(masks, trainable="none"))
        add = model.add_adapter
    else:
        model = get_peft_model(model, config(masks, trainable="none"))
        add = lambda config, name: model.add_adapter(name, config)  # noqa: E731
    before = describe(model.eval(), language_pairs=PAIRS)
    with pytest.raises(error, match=message):
        add(config(masks, **changes), "second")
    assert list(model.peft_config) == ["default"]
    assert_same(describe(model, language_pairs=PAIRS), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_m2m100(), str(tmp_path))
    assert again(**make_batch(), language_pairs=PAIRS).logits.equal(logits(model))
    add(config(masks, init_weights=False), "second")


def logits(model):
    return model(**make_batch(), language_pairs=PAIRS).logits


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    make_m2m100().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def good(base_directory, tmp_path_factory):
    """The directory of an adapter that fits the base."""
    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    get_peft_model(base, config(make_masks(base))).save_pretrained(directory)
    return directory


def change_file(directory, change):
    """Change the tensors of an adapter so that its digest still fits."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    change_config(directory, weights_digest=adapter_file.file_digest(path))


def change_config(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def key(tensors, suffix):
    return next(name for name in tensors if name.endswith(suffix))


DAMAGES = {
    "a tensor too few": lambda d: change_file(d, lambda t: t.pop(key(t, "_delta"))),
    "a tensor too many": lambda d: change_file(
        d, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(60, 16)})
    ),
    "an empty mask": lambda d: change_file(d, lambda t: t[key(t, "_mask")].zero_()),
    "cut off": lambda d: os.truncate(d / "adapter_model.safetensors", 999),
    "cut off with its digest": lambda d: (
        os.truncate(d / "adapter_model.safetensors", 999),
        change_config(d, weights_digest=adapter_file.file_digest(d / "adapter_model.safetensors")),
    ),
    "no weights": lambda d: os.remove(d / "adapter_model.safetensors"),
    "no weights and no digest": lambda d: (
        os.remove(d / "adapter_model.safetensors"),
        change_config(d, weights_digest=None),
    ),
    "an absurd rank": lambda d: change_config(d, trainable="low_rank", r=200_000_000),
    "a token outside the vocabulary": lambda d: change_config(d, trainable_token_indices=[999]),
    "a module that was not saved": lambda d: change_config(d, modules_to_save=["layer_norm"]),
}


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("by_transformers", [False, True], ids=["peft", "transformers"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_refused_file_leaves_the_model(base_directory, good, tmp_path, damage, by_transformers, second):
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    damaged = shutil.copytree(good, tmp_path / "damaged")
    damage(damaged)
    call, model = {}, base
    if second and by_transformers:
        base.load_adapter(str(good), "first")
    elif second:
        model = PeftModel.from_pretrained(base, str(good), "first")
    if second:
        call = {"language_pairs": PAIRS}
    before = describe(model, **call)
    with pytest.raises(Exception):  # noqa: B017 - each has a message of its own, tested in test_storage
        if by_transformers or second:
            model.load_adapter(str(damaged), "second")
        else:
            PeftModel.from_pretrained(base, str(damaged), "second")
    assert_same(describe(model, **call), before)
    if second:
        assert list(model.peft_config) == ["first"]
    if by_transformers or second:
        model.load_adapter(str(good), "second")
    else:
        PeftModel.from_pretrained(base, str(good), "second")


def test_weights_refused_after_injection_leave_the_model(base_directory, good, tmp_path):
    """Where the caller brings the config, and where the tensors cannot be put on the device named."""
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    before = describe(base)
    masks = make_masks(base)
    with pytest.raises(Exception, match="nowhere"):
        PeftModel.from_pretrained(base, str(good), torch_device="nowhere")
    assert_same(describe(base), before)
    shutil.copytree(good, tmp_path / "damaged")
    change_file(tmp_path / "damaged", lambda tensors: tensors.pop(key(tensors, "_delta")))
    before = describe(base)
    with pytest.raises(ValueError, match="missing .*delta"):
        PeftModel.from_pretrained(base, str(tmp_path / "damaged"), config=config(masks))
    assert_same(describe(base), before)


def test_a_second_adapter_that_cannot_be_read_is_not_left_selectable(base_directory, good):
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base_directory), str(good), "first")
    before = describe(model, language_pairs=PAIRS)
    with pytest.raises(Exception, match="nowhere"):
        model.load_adapter(str(good), "second", torch_device="nowhere")
    assert list(model.peft_config) == ["first"]
    assert_same(describe(model, language_pairs=PAIRS), before)


@pytest.mark.parametrize("damage", ["other pairs", "other bias", "damaged", "none"])
def test_weights_loaded_in_place_of_others_are_checked(base_directory, good, tmp_path, damage):
    """PEFT itself does not look at their config; masks of other pairs would run under the names of these."""
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base_directory), str(good))
    expected = logits(model)
    base = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    masks = make_masks(base, PAIRS[::-1]) if damage == "other pairs" else make_masks(base)
    torch.manual_seed(3)
    other = get_peft_model(base, config(masks, init_weights=False, mask_bias=damage == "other bias")).eval()
    other.save_pretrained(tmp_path / "other")
    if damage == "damaged":
        path = tmp_path / "other" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    if damage == "none":
        model.load_adapter(str(tmp_path / "other"), "default")
        assert logits(model).equal(logits(other)) and not logits(other).equal(expected)
        return
    with pytest.raises(ValueError, match="cannot replace those of 'default'|save was interrupted"):
        model.load_adapter(str(tmp_path / "other"), "default")
    assert logits(model).equal(expected)


def test_a_damaged_lora_file_does_not_take_the_masks_away(base_directory, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base_directory), lora).save_pretrained(tmp_path / "lora")
    good = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
    os.truncate(tmp_path / "lora" / "adapter_model.safetensors", 999)
    model = AutoModelForSeq2SeqLM.from_pretrained(base_directory)
    model.add_adapter(config(make_masks(model), trainable="none"), "masks")
    before, masked = describe(model.eval(), language_pairs=PAIRS), logits(model)
    with pytest.raises(Exception, match="nvalid|header|damaged|deserializ"):
        model.load_adapter(str(tmp_path / "lora"), "lora")
    assert_same(describe(model, language_pairs=PAIRS), before)
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(good)
    model.load_adapter(str(tmp_path / "lora"), "lora")
    model.set_adapter(["masks", "lora"])
    assert not logits(model).equal(masked)


def test_one_module_at_two_places_is_refused():
    model = make_m2m100()
    masks = make_masks(model)
    model.model.encoder.layers[1].fc1 = model.model.encoder.layers[0].fc1
    with pytest.raises(ValueError, match="made for another model|layers.0.fc1 and .*layers.1.fc1 are one module"):
        get_peft_model(model, config(masks))
    with pytest.raises(ValueError, match="layers.0.fc1 and .*layers.1.fc1 are one module"):
        get_peft_model(model, ns.NeuronSpecializationConfig(target_modules=["fc1"]))
