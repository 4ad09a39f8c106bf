"""The model card: written on every save, runnable as printed, and never over what its user wrote."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from peft import get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import neuron_specialization as ns
from neuron_specialization.neurons.adapter_file import pack_rows
from neuron_specialization.neurons.card import render_card
from neuron_specialization.neurons.card_sections import CardFacts
from neuron_specialization.neurons.extras import install
from neuron_specialization.neurons.files import atomic_directory
from neuron_specialization.neurons.kept_picture import draw_kept, kept_shares
from neuron_specialization.neurons.masks import NeuronMasks
from neuron_specialization.translation.training import save_whole

from .conftest import make_batch, make_m2m100, make_masks

ROOT = Path(__file__).parent.parent
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


def adapted(trainable="delta"):
    model = make_m2m100()
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), trainable=trainable, task_type="SEQ_2_SEQ_LM")
    return get_peft_model(model, config)


def by_peft(directory):
    adapted().save_pretrained(str(directory))


def by_transformers(directory):
    model = make_m2m100()
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), trainable="delta", task_type="SEQ_2_SEQ_LM")
    model.add_adapter(config)
    model.save_pretrained(directory)


def together(directory):
    ns.save_adapter(adapted(), directory)


def masks_alone(directory):
    make_masks(make_m2m100()).save_pretrained(directory)


def by_trainer(directory):
    """A checkpoint of a training; called in a folder of a run."""
    model = adapted()
    ns.set_language_pair(model, "en-de")
    batch = make_batch()
    rows = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    steps = {"max_steps": int(directory.name.rpartition("-")[2]), "save_steps": 1, "report_to": "none"}
    args = Seq2SeqTrainingArguments(directory.parent, **steps, use_cpu=True, disable_tqdm=True)
    Seq2SeqTrainer(model, args, train_dataset=rows).train()


def as_identify(directory):
    """With other files, all together."""
    with atomic_directory(directory) as folder:
        make_masks(make_m2m100()).save_pretrained(folder)


def as_specialize(directory):
    args = Seq2SeqTrainingArguments(directory, report_to="none", use_cpu=True)
    save_whole(Seq2SeqTrainer(adapted(), args), directory)


def by_accelerate(directory):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted())
    accelerator.unwrap_model(model).save_pretrained(str(directory), state_dict=accelerator.get_state_dict(model))


WAYS = pytest.mark.parametrize(
    "save",
    [by_peft, by_transformers, together, masks_alone, by_trainer, as_identify, as_specialize, by_accelerate],
    ids=lambda save: save.__name__,
)


@pytest.fixture
def directory(tmp_path):
    """Where each way saves; Trainer names its checkpoints so."""
    return tmp_path / "checkpoint-1"


@WAYS
def test_every_way_to_save_writes_a_card_about_this_adapter(directory, save):
    save(directory)
    text = (directory / "README.md").read_text()
    assert "More Information Needed" not in text and "import neuron_specialization" in text.split("##")[0]
    assert "en-de, de-en, en-fr, fr-en" in text
    for package in ("neuron-specialization", "torch", "transformers"):
        assert f"\n- {package} {importlib.metadata.version(package)}\n" in text
    data = ModelCard.load(directory / "README.md").data
    assert data.language == ["en", "de", "fr"] and data.library_name == "peft" and data.pipeline_tag == "translation"
    assert {"neuron-specialization", "multilingual"} <= set(data.tags)
    if save is masks_alone:
        assert "Nothing was trained under these masks" in text
    else:
        assert 'trainable="delta"' in text
    assert "(kept_neurons.svg)" in text and (directory / "kept_neurons.svg").is_file()


def test_the_picture_shows_the_kept_shares_of_pairs_by_layer():
    masks = make_masks(make_m2m100())
    packed = {name: pack_rows(rows) for name, rows in masks.rows.items()}
    shares = kept_shares(packed, {name: rows.shape[1] for name, rows in masks.rows.items()})
    root = ElementTree.fromstring(draw_kept(shares, masks.stacks, masks.routes))
    texts = [each.text for each in root if each.tag.endswith("text")]
    assert texts[:4] == masks.language_pairs and texts[5:] == ["encoder", "0", "1", "decoder", "0", "1"]
    every = [share for rows in shares.values() for share in rows.tolist()]
    step = (max(every) - min(every)) / 15
    for group, stack in zip((each for each in root if each.tag.endswith("}g")), ("encoder", "decoder"), strict=True):
        light = {}
        for path in group:
            red, green, blue = map(int, re.findall(r"\d+", path.get("stroke")))
            light |= {place: red + green for place in re.findall(r"M(\d+) (\d+)h", path.get("d"))}
        blocks = [name for name in masks.rows if masks.stacks[name] == stack]
        kept = {(str(i), str(j)): float(shares[name][j]) for i, name in enumerate(blocks) for j in range(4)}
        assert light.keys() == kept.keys()
        apart = [(a, b) for a in kept for b in kept if kept[b] - kept[a] > 1.1 * step]
        assert apart and all(light[a] < light[b] for a, b in apart), "what is kept more is lighter"


def test_an_adapter_that_transformers_loaded_is_saved_with_its_table_and_picture(tmp_path):
    by_transformers(tmp_path / "first")
    model = make_m2m100()
    model.load_adapter(str(tmp_path / "first"))
    model.save_pretrained(tmp_path / "second")
    for name in ("README.md", "kept_neurons.svg"):
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()


@WAYS
def test_a_card_is_written_anew_until_its_user_edits_it(directory, save):
    save(directory)
    first = (directory / "README.md").read_text()
    save(directory)
    assert (directory / "README.md").read_text() == first
    (directory / "README.md").write_text(first.replace("## Limits", "## Limits\n\nNot for court rooms."))
    (directory / "kept_neurons.svg").write_text("mine")
    save(directory)
    assert "Not for court rooms." in (directory / "README.md").read_text()
    assert (directory / "kept_neurons.svg").read_text() == "mine"


@pytest.mark.parametrize("edit", [{"license": "cc-by-4.0"}, {"tags": ["mine"]}, {"base_model": "me/my-base"}], ids=str)
def test_front_matter_that_the_user_edited_stays(tmp_path, edit):
    """PEFT's own cards get its tags and the base's directory with every save."""
    by_peft(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    for name, value in edit.items():
        setattr(card.data, name, value)
    card.save(tmp_path / "README.md")
    by_peft(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


def test_the_table_shows_the_kept_shares(tmp_path):
    masks = make_masks(make_m2m100())
    masks.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for name, rows in masks.rows.items():
        kept = rows.double().mean(1)
        row = re.search(rf"\| {re.escape(name)} \| \w+ \| {rows.shape[1]} \| (\S+) \| \S+ \| (\S+) \| (\S+) \|", text)
        assert row is not None
        assert row.groups() == tuple(f"{share:.0%}" for share in (kept.mean(), kept.min(), kept.max()))


@pytest.mark.parametrize("sentence", ['She said "no".', "C:\\new\\", "L'été\nfini", "日本語 {{ base }} <b>"])
def test_any_sentence_is_that_sentence_in_the_usage_block(sentence):
    config = {**make_masks(make_m2m100()).metadata(), "trainable": "delta"}
    block = re.search(
        r"## Usage\n\n```python\n(.*?)\n```", render_card(config, {}, CardFacts(sentence=sentence)), re.S
    )
    assert block is not None
    strings = [node.value for node in ast.walk(ast.parse(block[1])) if isinstance(node, ast.Constant)]
    assert sentence in strings


def test_the_package_is_installed_from_where_it_is():
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    config = {**make_masks(make_m2m100()).metadata(), "trainable": "delta"}
    assert f"pip install git+{repository}\n" in render_card(config, {}, CardFacts()).split("##")[0]
    readme = (ROOT / "README.md").read_text()
    assert f"git clone {repository} " in readme and f"`pip install git+{repository}`" in readme
    pages = [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *CARDS, *ROOT.glob("recipes/*.py")]
    pages += [path for path in ROOT.glob("src/**/*") if path.suffix in (".py", ".jinja") and path.name != "extras.py"]
    assert not [page for page in pages if re.search("pip install ['\"]?neuron-specialization", page.read_text())]


def test_extras_are_installed_from_where_the_package_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = install("report")
    requirement = Requirement(shlex.split(command)[-1])
    assert command.startswith("pip install '") and requirement.url == f"git+{project['urls']['Repository']}"
    assert requirement.name == project["name"] and requirement.extras == {"report"}
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("recipes/*.py")]
    named = {extra for path in sources for extra in re.findall(r"{install\('([\w-]+)'\)}", path.read_text())}
    assert {"report", "export", "zero-shot"} <= named <= set(project["optional-dependencies"])


def test_the_usage_block_says_what_to_replace_and_names_tokens_where_the_adapter_does_not():
    masks = make_masks(make_m2m100())
    usage = render_card({**masks.metadata(), "trainable": "none"}, {}, CardFacts())
    assert 'base = "path/to/base"  # replace by' in usage and 'adapter = "path/to/adapter"  # replace by' in usage
    assert 'tokens = {"en": "en", "de": "de"}  # replace by' in usage and "language_tokens=tokens" in usage
    known = {**masks.metadata(), "language_token_ids": {"en": 4}, "base_model_name_or_path": "me/base"}
    usage = render_card(known, {}, CardFacts("me/masks"))
    assert "replace" not in usage and "tokens = " not in usage and '"en-de", num_beams=5' in usage
    config = ns.NeuronSpecializationConfig(task_type="SEQ_2_SEQ_LM")  # its one pair has no languages to translate
    usage = render_card({**config.to_dict(), "fingerprint": {}}, {}, CardFacts())
    assert "PeftModel.from_pretrained(" in usage and "ns.translate" not in usage and "adapter)\n```\n" in usage


def test_without_the_import_that_the_card_shows_peft_knows_no_such_adapter(tmp_path):
    by_peft(tmp_path)
    text = (tmp_path / "README.md").read_text()
    line, stops = re.search("> (import .*?)  #", text)[1], re.search("`(KeyError: '.*?')`", text)[1]
    load = f"from peft import PeftConfig; print(PeftConfig.from_pretrained({str(tmp_path)!r}).peft_type.value)"
    run = partial(subprocess.run, capture_output=True, text=True)
    assert run([sys.executable, "-c", load]).stderr.splitlines()[-1] == stops
    assert run([sys.executable, "-c", f"{line}; {load}"]).stdout == "NEURON_SPECIALIZATION\n"


@pytest.mark.parametrize("knows_tokens", [True, False])
def test_the_usage_block_runs_as_printed(tmp_path, toy, toy_tokenizer, capsys, knows_tokens):
    from neuron_specialization.translation.checkpoints import new_model

    torch.manual_seed(0)
    new_model(toy_tokenizer, 1, 16, 32, 2, 0.0, 64).save_pretrained(tmp_path / "base")
    toy_tokenizer.save_pretrained(tmp_path / "base")
    model = make_model(tmp_path / "base")
    masks = make_masks(model, pairs=tuple(toy.language_pairs[:2]))
    if knows_tokens:
        tokens = {code: code for code in toy.languages}
        masks = replace(masks, language_token_ids=ns.language_token_ids(toy_tokenizer, tokens))
    masks.save_pretrained(tmp_path / "adapter")
    config = ns.neurons.adapter_file.read_config(tmp_path / "adapter")
    text = render_card(config, {}, CardFacts(repo_id=str(tmp_path / "adapter")))
    block = re.search(r"## Usage\n\n```python\n(.*?)```", text, re.S)
    assert block is not None and ("language_tokens=tokens" in block[1]) != knows_tokens
    exec(block[1].replace("path/to/base", str(tmp_path / "base")), {})
    assert capsys.readouterr().out.startswith("[")
    assert isinstance(NeuronMasks.from_pretrained(tmp_path / "adapter"), NeuronMasks)


def make_model(directory):
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(directory)
