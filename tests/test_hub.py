"""Adapters on the Hub: the real client against a Hub on loopback."""

import json
import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, hf_api
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import neuron_specialization as ns
from neuron_specialization.adapter.registration import _CREATE_CARD
from neuron_specialization.export.hub import publish
from neuron_specialization.neurons.adapter_file import pack_rows
from neuron_specialization.neurons.card_sections import CardFacts
from neuron_specialization.neurons.masks import NeuronMasks

from .conftest import make_batch, make_m2m100, make_masks
from .hub_server import TOKEN, hub_server

RECIPES = Path(__file__).parent.parent / "recipes"
# huggingface_hub hands its PUT of large files to httpx in a way that httpx deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process takes for the real one, with an empty cache and the owner's token."""
    with hub_server() as (server, url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # weights go by Git LFS
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made anew, for this Hub
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def adapted():
    model = make_m2m100()
    config = ns.NeuronSpecializationConfig(
        masks=make_masks(model), trainable="delta", init_weights=False, task_type="SEQ_2_SEQ_LM"
    )
    return get_peft_model(model, config).eval()


def injected():
    """As `adapted`, by transformers."""
    model = make_m2m100()
    model.add_adapter(ns.NeuronSpecializationConfig(masks=make_masks(model), task_type="SEQ_2_SEQ_LM"))
    return model


def recipe(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), *map(str, words)])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


def logits(model):
    with torch.no_grad():
        return model(**make_batch(), language_pairs="en-de").logits


def test_what_push_to_hub_uploads_is_what_others_load(hub):
    model = adapted()
    model.push_to_hub("me/adapter")
    assert [request[:9] for request in hub.requests].count("PUT /lfs/") == 1
    loaded = PeftModel.from_pretrained(make_m2m100(), "me/adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    card = huggingface_hub.ModelCard.load("me/adapter")
    assert "More Information Needed" not in card.text and card.data.pipeline_tag == "translation"


@pytest.mark.parametrize("make", [adapted, injected])
def test_a_trainer_uploads_the_adapters_own_card(hub, tmp_path, make):
    args = Seq2SeqTrainingArguments(tmp_path / "run", hub_model_id="me/trained", report_to="none", use_cpu=True)
    trainer = Seq2SeqTrainer(make(), args)
    trainer.push_to_hub(license="cc0-1.0", dataset_tags="me/corpus")
    card = huggingface_hub.ModelCard.load("me/trained")
    assert "more information needed" not in card.text.lower() and "en-de, de-en, en-fr, fr-en" in card.text
    assert '"me/trained"' in card.text and "| learning_rate | 5e-05 |" in card.text and "| seed | 42 |" in card.text
    assert (card.data.license, card.data.datasets, card.data.pipeline_tag) == ("cc0-1.0", ["me/corpus"], "translation")


def test_a_card_that_trainer_generated_gives_way_until_its_user_edits_it(tmp_path):
    args = Seq2SeqTrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer, card = Seq2SeqTrainer(adapted(), args), tmp_path / "README.md"
    for user_says in (None, "Not in court."):
        trainer.save_model()
        _CREATE_CARD(trainer)  # as without this package
        generated = card.read_text()
        assert generated.count("More information needed") == 3
        if user_says:
            card.write_text(generated.replace("More information needed", user_says, 1))
        trainer.save_model()
        assert (user_says or "en-de, de-en, en-fr, fr-en") in card.read_text()


def by_publish(masks, directory):
    masks.save_pretrained(directory)
    publish(directory, CardFacts("me/adapter"))


def by_trainer(masks, directory):
    args = Seq2SeqTrainingArguments(directory, hub_model_id="me/adapter", report_to="none", use_cpu=True)
    Seq2SeqTrainer(adapted(), args).push_to_hub()


def by_masks(masks, directory):
    masks.push_to_hub("me/adapter")


def by_model(masks, directory):
    adapted().push_to_hub("me/adapter")


@pytest.mark.parametrize("push", [by_masks, by_publish, by_trainer, by_model])
def test_a_card_that_was_edited_on_the_hub_stays(hub, tmp_path, push):
    masks = make_masks(make_m2m100())
    push(masks, tmp_path / "first")
    push(masks, tmp_path / "second")  # a card that was not edited is written anew, without a word
    card = huggingface_hub.ModelCard.load("me/adapter").content
    hub.commit("me/adapter", {"README.md": card.replace("## Limits", "## Limits\n\nNot in court.").encode()})
    with pytest.warns(match="card of me/adapter was edited on the Hub") if push is not by_model else nullcontext():
        push(masks, tmp_path / "third")
    assert "Not in court." in huggingface_hub.ModelCard.load("me/adapter").text


def test_a_card_that_was_edited_here_is_published_over_one_of_the_hub(hub, tmp_path):
    for words in ("Not in court.", "Not in hospitals."):
        make_masks(make_m2m100()).save_pretrained(tmp_path)
        card = tmp_path / "README.md"
        card.write_text(card.read_text().replace("## Limits", f"## Limits\n\n{words}"))
        with pytest.warns(match="was edited and is published as it is"):
            publish(tmp_path, CardFacts("me/adapter"))
        assert words in huggingface_hub.ModelCard.load("me/adapter").text


def test_masks_are_read_at_a_revision(hub):
    model = make_m2m100()
    first, second = make_masks(model, k=0.5), make_masks(model, k=0.9)
    first.push_to_hub("me/masks")
    revision = hub.head("me/masks")
    second.push_to_hub("me/masks")
    for masks, at in ((first, revision), (second, None)):
        found = NeuronMasks.from_pretrained("me/masks", revision=at)
        assert all(torch.equal(found.rows[name], rows) for name, rows in masks.rows.items())
        loaded = PeftModel.from_pretrained(make_m2m100(), "me/masks", revision=at).get_base_model()
        for name, rows in masks.rows.items():
            packed = loaded.get_submodule(name).neuron_specialization_mask["default"]
            assert torch.equal(packed, pack_rows(rows))


def test_an_adapter_in_the_older_format_is_read_from_the_hub_as_from_a_directory(hub, tmp_path):
    model = adapted()
    model.save_pretrained(str(tmp_path / "bin"), safe_serialization=False)
    api = huggingface_hub.HfApi()
    api.create_repo("me/bin")
    api.upload_folder(repo_id="me/bin", folder_path=tmp_path / "bin")
    assert torch.equal(logits(PeftModel.from_pretrained(make_m2m100(), "me/bin").eval()), logits(model))
    assert NeuronMasks.from_pretrained("me/bin") == NeuronMasks.from_pretrained(tmp_path / "bin")


def test_a_private_repository_needs_a_token(hub, monkeypatch):
    masks = make_masks(make_m2m100())
    masks.push_to_hub("me/secret", private=True)
    with pytest.raises(ValueError, match="No adapter at 'me/secret'.*can be reached"):
        NeuronMasks.from_pretrained("me/secret", token=False)
    assert NeuronMasks.from_pretrained("me/secret", token=TOKEN).language_pairs == masks.language_pairs
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(Exception, match="me/secret"):
        PeftModel.from_pretrained(make_m2m100(), "me/secret")
    loaded = PeftModel.from_pretrained(make_m2m100(), "me/secret", token=TOKEN)
    assert loaded.peft_config["default"].language_pairs == masks.language_pairs


def test_what_is_to_be_private_is_not_put_into_a_public_repository(hub, tmp_path, monkeypatch, capsys):
    masks = make_masks(make_m2m100())
    for name in ("me/secret", "me/public"):
        masks.push_to_hub(name, private=name == "me/secret")
    masks.save_pretrained(tmp_path)
    commits = {name: list(of) for name, of in hub.revisions.items()}
    with pytest.raises(ValueError, match="me/public exists and is public.*Nothing was uploaded"):
        masks.push_to_hub("me/public", private=True)
    publish = "publish", monkeypatch, "--adapter", tmp_path, "--private", "true", "--repo"
    with pytest.raises(SystemExit):
        recipe(*publish, "me/public")
    assert "me/public exists and is public" in capsys.readouterr().err
    assert {name: list(of) for name, of in hub.revisions.items()} == commits
    masks.push_to_hub("me/secret", private=True)
    recipe(*publish, "me/secret")
    recipe(*publish, "me/new")
    assert hub.private == {"me/secret", "me/new"} and len(hub.revisions["me/secret"]) == len(commits["me/secret"]) + 2


def test_an_adapter_that_was_read_once_is_read_again_without_a_network(hub, monkeypatch):
    masks, model = make_masks(make_m2m100()), adapted()
    masks.push_to_hub("me/masks")
    model.push_to_hub("me/adapter")
    NeuronMasks.from_pretrained("me/masks")
    PeftModel.from_pretrained(make_m2m100(), "me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    found = NeuronMasks.from_pretrained("me/masks")
    assert all(torch.equal(found.rows[name], rows) for name, rows in masks.rows.items())
    loaded = PeftModel.from_pretrained(make_m2m100(), "me/adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert len(hub.requests) == asked


@pytest.mark.parametrize("interrupted", ["fail_weights", "fail_commits"])
def test_an_interrupted_upload_leaves_no_half_of_it_and_can_be_repeated(
    hub, tmp_path, monkeypatch, capsys, interrupted
):
    adapted().save_pretrained(tmp_path / "adapter")
    words = ("--adapter", tmp_path / "adapter", "--repo", "me/adapter", "--license", "cc-by-4.0")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client tries again
    setattr(hub, interrupted, 100)
    with pytest.raises(SystemExit):
        recipe("publish", monkeypatch, *words)
    said = capsys.readouterr().err
    assert re.search("Error: The Hub was not reached, and nothing was published: .* Try again", said)
    assert set(hub.revisions["me/adapter"][hub.head("me/adapter")]) == {".gitattributes"}
    setattr(hub, interrupted, 0)
    recipe("publish", monkeypatch, *words)
    files = hub.revisions["me/adapter"][hub.head("me/adapter")]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "kept_neurons.svg"} <= set(files)
    card = files["README.md"].decode()
    assert "license: cc-by-4.0" in card and '"me/adapter"' in card and "(kept_neurons.svg)" in card


def test_publishing_without_the_right_token_or_a_network_says_so_in_one_sentence(hub, tmp_path, monkeypatch, capsys):
    adapted().save_pretrained(tmp_path / "adapter")
    words = ("--adapter", tmp_path / "adapter", "--repo", "me/adapter")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(SystemExit):
        recipe("publish", monkeypatch, *words)
    error = capsys.readouterr().err
    assert "Error: The Hub did not take me/adapter: " in error and "401" in error and "`hf auth login`" in error
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client tries again
        patch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")  # where nobody answers
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        recipe("publish", monkeypatch, *words)
    assert "Error: The Hub was not reached, and nothing was published: " in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        recipe("publish", monkeypatch, *words)
    assert "Error: The Hub did not take me/adapter: " in capsys.readouterr().err and not hub.revisions


def test_a_lora_of_a_comparison_is_published_with_its_card(hub, tmp_path, monkeypatch):
    stage = tmp_path / "lora" / "seed-0"
    lora = LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(make_m2m100(), lora).eval()
    model.save_pretrained(stage / "model")
    row = {"direction": "de-en", "bleu": 33.626, "chrf++": 57.234}
    part = {"recipe": "compare_methods", "rows": [row], "translations": {"de-en": ["a"] * 9}, "num_beams": 1}
    part |= {"signatures": {"de-en": {"bleu_signature": "b", "chrf++_signature": "c"}}}
    part |= {"language_tokens": {"en": "eng_Latn", "de": "deu_Latn"}}
    (stage / "part.json").write_text(json.dumps(part))
    words = ("--adapter", stage / "model", "--repo", "me/lora", "--scores", stage / "part.json")
    recipe("publish", monkeypatch, *words)
    loaded = PeftModel.from_pretrained(make_m2m100(), "me/lora").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**make_batch()).logits, model(**make_batch()).logits)
    card = hub.revisions["me/lora"][hub.head("me/lora")]["README.md"].decode()
    assert "# LoRA for de-en\n" in card and "Greedy:" in card and 'adapter = "me/lora"\n' in card
    assert 'tokens = {"de": "deu_Latn", "en": "eng_Latn"}\n' in card and '["A sentence in de."], "de-en"' in card


def test_publishing_what_is_no_adapter_is_refused_before_anything_is_sent(hub, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        recipe("publish", monkeypatch, "--adapter", tmp_path, "--repo", "me/adapter")
    assert "is not an adapter directory" in capsys.readouterr().err
    assert hub.requests == []


def test_pairs_of_several_people_are_merged_into_one_adapter(hub, tmp_path, monkeypatch):
    model = make_m2m100()
    mine, theirs = make_masks(model, pairs=("en-de",)), make_masks(model, pairs=("en-fr", "fr-en"))
    mine.save_pretrained(tmp_path / "mine")
    theirs.push_to_hub("they/masks")
    recipe("merge_masks", monkeypatch, "--adapters", tmp_path / "mine", "they/masks", "--output_dir", tmp_path / "all")
    merged = NeuronMasks.from_pretrained(tmp_path / "all")
    assert merged.language_pairs == ["en-de", "en-fr", "fr-en"]
    for masks in (mine, theirs):
        for pair in masks.language_pairs:
            assert all(torch.equal(merged.row(pair, name), masks.row(pair, name)) for name in masks.rows)


def test_merging_says_whose_training_is_left_out(tmp_path, monkeypatch, capsys):
    adapted().save_pretrained(tmp_path / "trained")
    make_masks(make_m2m100(), pairs=("en-cs",)).save_pretrained(tmp_path / "masks")
    make_masks(make_m2m100(), pairs=("en-fi",)).save_pretrained(tmp_path / "more")
    merge = "merge_masks", monkeypatch, "--output_dir", tmp_path / "merged", "--adapters", tmp_path / "masks"
    with pytest.raises(SystemExit):
        recipe(*merge, tmp_path / "masks")
    assert "Each adapter may be named once, but these are repeated" in capsys.readouterr().err
    recipe(*merge, tmp_path / "more")
    assert "is not merged" not in capsys.readouterr().out
    recipe(*merge, tmp_path / "trained")
    assert (
        f"What was trained under the masks of {tmp_path / 'trained'} is not merged: the result needs training."
        in capsys.readouterr().out
    )


def biased(directory):
    model = make_m2m100()
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), mask_bias=True, task_type="SEQ_2_SEQ_LM")
    get_peft_model(model, config).save_pretrained(directory)


REFUSED = {
    "conflict": (lambda path: make_masks(make_m2m100(), k=0.9).save_pretrained(path), "keep different neurons in"),
    "architecture": (lambda path: make_masks(make_m2m100(layers=1)).save_pretrained(path), "for different models"),
    "checkpoint": (lambda path: make_masks(make_m2m100(init_std=0.4)).save_pretrained(path), "with different weights"),
    "bias": (biased, "has mask_bias=True"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_merged_is_refused_with_a_reason(tmp_path, run_here, reason):
    save, message = REFUSED[reason]
    make_masks(make_m2m100()).save_pretrained(tmp_path / "mine")
    save(tmp_path / "theirs")
    adapters = str(tmp_path / "mine"), str(tmp_path / "theirs")
    error = run_here("merge_masks.py", "--adapters", *adapters, "--output_dir", str(tmp_path / "all"), fails=True)
    assert message in error and "Traceback" not in error and not (tmp_path / "all").exists()


@pytest.mark.parametrize(("how", "together"), [("union", torch.logical_or), ("intersection", torch.logical_and)])
def test_masks_of_the_same_pairs_are_combined_into_one_adapter(tmp_path, monkeypatch, how, together):
    model = make_m2m100()
    one, two = make_masks(model, k=0.6), make_masks(model, k=0.6, seed=7)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    adapters = "--adapters", tmp_path / "one", tmp_path / "two"
    recipe("merge_masks", monkeypatch, *adapters, "--how", how, "--output_dir", tmp_path / "both")
    merged = NeuronMasks.from_pretrained(tmp_path / "both")
    assert merged.language_pairs == one.language_pairs
    for name in one.rows:
        for pair in one.language_pairs:
            assert torch.equal(merged.row(pair, name), together(one.row(pair, name), two.row(pair, name)))
