"""The model card: written on every save, runnable as printed, and never over what its user wrote."""

import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
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
from neuron_specialization.export.hub import facts_from_results
from neuron_specialization.neurons.adapter_file import pack_rows
from neuron_specialization.neurons.card import CardFacts, describe_adapter, is_edited, render_card
from neuron_specialization.neurons.extras import install
from neuron_specialization.neurons.kept_picture import draw_kept, kept_shares
from neuron_specialization.neurons.masks import NeuronMasks

from .conftest import make_batch, make_m2m100, make_masks

ROOT = Path(__file__).parent.parent
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
SCORES = {
    "en-de": {
        "bleu": 33.626,
        "chrf++": 57.234,
        "bleu_signature": "nrefs:1|tok:13a",
        "chrf++_signature": "nrefs:1|nw:2",
        "sentences": 1000,
    }
}


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


def by_accelerate(directory):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted())
    accelerator.unwrap_model(model).save_pretrained(str(directory), state_dict=accelerator.get_state_dict(model))


WAYS = pytest.mark.parametrize(
    "save",
    [by_peft, by_transformers, together, masks_alone, by_trainer, by_accelerate],
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


def test_a_license_that_the_user_added_stays(tmp_path):
    by_peft(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data.license = "cc-by-4.0"
    card.save(tmp_path / "README.md")
    by_peft(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license == "cc-by-4.0"


def test_the_table_shows_the_kept_shares(tmp_path):
    masks = make_masks(make_m2m100())
    masks.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for name, rows in masks.rows.items():
        kept = rows.double().mean(1)
        row = re.search(rf"\| {re.escape(name)} \| \w+ \| {rows.shape[1]} \| (\S+) \| \S+ \| (\S+) \| (\S+) \|", text)
        assert row is not None
        assert row.groups() == tuple(f"{share:.0%}" for share in (kept.mean(), kept.min(), kept.max()))


def test_scores_are_in_the_text_and_in_the_front_matter():
    masks = make_masks(make_m2m100(), pairs=("en-de",))
    config = {**masks.metadata(), "trainable": "full"}
    text = render_card(config, {}, CardFacts("me/masks", scores=SCORES, training={"updates": 7}))
    assert "| en-de | 1000 | 33.63 | 57.23 |" in text and "`nrefs:1|tok:13a`" in text and "| updates | 7 |" in text
    results, data = ModelCard(text).data.eval_results, ModelCard(text).data
    assert data.metrics == ["bleu", "chrf"] and data.model_name == "masks"
    assert {(r.metric_type, r.metric_value, r.dataset_config) for r in results} == {
        ("bleu", 33.63, "en-de"),
        ("chrf", 57.23, "en-de"),
    }


@pytest.mark.parametrize("base", ["t5-small", "facebook/nllb-200-distilled-600M"])
def test_a_base_on_the_hub_is_named_whether_or_not_it_has_an_owner(base):
    config = {**make_masks(make_m2m100()).metadata(), "trainable": "none", "base_model_name_or_path": base}
    text = render_card(config, {}, CardFacts("me/masks", license="mit", datasets=["me/corpus"]))
    data = ModelCard(text).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == (base, "adapter")
    assert f"base_model:adapter:{base}" in data.tags and f'base = "{base}"\n' in text
    assert (data.license, data.datasets, data.metrics) == ("mit", ["me/corpus"], None)


@pytest.mark.parametrize(
    ("file", "told", "kind"),
    [
        ("/home/me/test.parquet", "test.parquet", "unknown"),
        ("data/test.{lang}", "test.{lang}", "unknown"),
        ("wmt/wmt16:de-en", "wmt/wmt16:de-en", "wmt/wmt16"),
    ],
)
def test_scores_are_told_of_the_data_they_are_on(tmp_path, file, told, kind):
    path = tmp_path / "scores.json"
    arguments = [{"num_beams": 5}, {"train_file": None, "test_file": file}]
    path.write_text(json.dumps({"recipe": "score", "directions": SCORES, "arguments": arguments}))
    facts = facts_from_results(CardFacts("me/masks", datasets=["me/training"]), scores=path)
    config = {**make_masks(make_m2m100(), pairs=("en-de",)).metadata(), "trainable": "full"}
    text = render_card(config, {}, facts)
    assert {(r.dataset_name, r.dataset_type) for r in ModelCard(text).data.eval_results} == {(told, kind)}
    assert f"## Evaluation\n\nOn `{told}`:\n\n| direction |" in text and ModelCard(text).data.datasets == [
        "me/training"
    ]


def test_scores_are_read_from_a_stage_of_a_comparison_too(tmp_path):
    row = {"method": "ours", "seed": 0, "direction": "en-de", "loss": 2.9, "bleu": 33.626, "chrf++": 57.234}
    signatures = {"en-de": {name: value for name, value in SCORES["en-de"].items() if "signature" in name}}
    part = {"recipe": "compare_methods", "rows": [row], "signatures": signatures}
    part |= {"translations": {"en-de": ["Ein Hund."] * 1000}}
    (tmp_path / "part.json").write_text(json.dumps(part))
    assert facts_from_results(CardFacts(), scores=tmp_path / "part.json").scores == SCORES
    (tmp_path / "part.json").write_text(json.dumps({**part, "signatures": {}}))
    with pytest.raises(ValueError, match="part.json is not the complete results.json"):
        facts_from_results(CardFacts(), scores=tmp_path / "part.json")


def test_a_card_says_that_masks_are_a_control():
    masks = make_masks(make_m2m100())
    for made, said in (
        (ns.RandomOverlap(masks).select(), True),
        (ns.WrongPair(masks, {"de": "fr", "fr": "de"}).select(), True),
        (masks, False),
    ):
        text = render_card({**made.metadata(), "trainable": "none"}, {}, CardFacts())
        assert f"Neurons were selected by {made.selector['name']}" in text and ("This is a control: " in text) == said


SCORED = {"recipe": "score", "directions": SCORES, "arguments": [{"test_file": "test.tsv"}]}
COUNTED = {"recipe": "identify", "tokens": {"encoder": [9]}, "arguments": [{"validation_file": "dev.tsv"}]}
RUN = {"depends_on": {"seed": 0}, "result": {"updates": 7, "environment": {"torch": "2.13.0"}}}


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("scores", [SCORED], "the complete results.json of recipes/score.py"),
        ("scores", {**SCORED, "recipe": "identify"}, "written by identify, expected recipes/score.py"),
        ("scores", {**SCORED, "directions": {"en-de": {"bleu": 33.6}}}, "score.py: KeyError.'chrf"),
        ("scores", {"recipe": "score", "arguments": SCORED["arguments"]}, "score.py: KeyError.'directions'"),
        ("scores", {**SCORED, "arguments": [{"num_beams": 5}]}, "score.py: KeyError.'test_file'"),
        ("identification", [COUNTED], "the complete results.json of recipes/identify.py"),
        ("identification", {**COUNTED, "tokens": None}, "the complete results.json of recipes/identify.py"),
        ("identification", {**COUNTED, "arguments": "none"}, "the complete results.json of recipes/identify.py"),
        ("training", {**RUN, "depends_on": []}, "the run.json of a finished training run"),
        ("training", {**RUN, "result": {"updates": 7, "environment": []}}, "the run.json of a finished training run"),
    ],
)
def test_incomplete_results_are_refused_by_name(tmp_path, kind, content, expected):
    path = tmp_path / "file.json"
    complete = {"scores": SCORED, "identification": COUNTED, "training": RUN}
    path.write_text(json.dumps(complete[kind]))
    facts_from_results(CardFacts(), **{kind: path})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"file.json .*{expected}"):
        facts_from_results(CardFacts(), **{kind: path})


def test_a_published_card_names_no_directory_of_its_author(tmp_path):
    make_m2m100().save_pretrained(tmp_path / "secret_project")
    model = type(make_m2m100()).from_pretrained(tmp_path / "secret_project")
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), task_type="SEQ_2_SEQ_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model.endswith("secret_project")  # as PEFT's
    describe_adapter(tmp_path / "adapter", CardFacts("me/adapter"))
    assert "secret_project" not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_card_alone_tells_what_recipes_measured_and_names_no_directory(tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_m2m100().save_pretrained(tmp_path / "secret_project")
    model = type(make_m2m100()).from_pretrained(tmp_path / "secret_project")
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), task_type="SEQ_2_SEQ_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    arguments = [{"validation_file": str(tmp_path / "dev.jsonl"), "max_sentences": 50}]
    identified = {"recipe": "identify", "arguments": arguments, "tokens": {"encoder": [1200, 1100], "decoder": [900]}}
    (tmp_path / "identified.json").write_text(json.dumps(identified))
    (tmp_path / "scores.json").write_text(json.dumps(SCORED))
    given = ["--identification", "identified.json", "--scores", "scores.json", "--training", "run.json"]
    given += ["--license", "cc0-1.0"]
    (tmp_path / "run.json").write_text(json.dumps({"depends_on": {"learning_rate": 0.001}, "result": None}))
    error = run_here("publish.py", "--adapter", "adapter", "--card_only", "cards/mine", *given, fails=True)
    assert "run.json is not the run.json of a finished training run" in error
    given[given.index("--training") :] = ["--license", "cc0-1.0"]
    run_here("publish.py", "--adapter", "adapter", "--card_only", "cards/mine", *given)
    text = (tmp_path / "cards" / "mine" / "README.md").read_text()
    assert "| counted on | dev.jsonl |" in text and "| encoder positions per pair | 1,100 to 1,200 |" in text
    assert "| en-de | 1000 | 33.63 | 57.23 |" in text and "On `test.tsv`:" in text and "model_type m2m_100" in text
    assert "secret_project" not in text and str(tmp_path) not in text
    assert sorted(path.name for path in (tmp_path / "cards" / "mine").iterdir()) == ["README.md", "kept_neurons.svg"]
    for where in ([], ["--repo", "me/mine", "--card_only", "cards"]):
        assert "Say where to publish" in run_here("publish.py", "--adapter", "adapter", *where, fails=True)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_committed_cards_are_as_they_were_written(path):
    text = path.read_text()
    assert not is_edited(path) and "More Information Needed" not in text
    assert "BLEU: `nrefs" in text and "| updates |" in text and not re.search(r"[\s\"'`({]/\w", text)
    assert ("| counted on |" in text) == (not path.parent.name.startswith("tatoeba-sequential")) and (
        path.parent / "kept_neurons.svg"
    ).is_file()


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


def test_the_usage_block_runs_as_printed(tmp_path, toy, toy_tokenizer, capsys):
    from neuron_specialization.translation.checkpoints import new_model

    torch.manual_seed(0)
    new_model(toy_tokenizer, 1, 16, 32, 2, 0.0, 64).save_pretrained(tmp_path / "base")
    toy_tokenizer.save_pretrained(tmp_path / "base")
    model = make_model(tmp_path / "base")
    masks = make_masks(model, pairs=tuple(toy.language_pairs[:2]))
    masks.save_pretrained(tmp_path / "adapter")
    config = ns.neurons.adapter_file.read_config(tmp_path / "adapter")
    text = render_card(config, {}, CardFacts(repo_id=str(tmp_path / "adapter")))
    block = re.search(r"## Usage\n\n```python\n(.*?)```", text, re.S)
    assert block is not None
    exec(block[1].replace("path/to/base", str(tmp_path / "base")), {})
    assert capsys.readouterr().out.startswith("[")
    assert isinstance(NeuronMasks.from_pretrained(tmp_path / "adapter"), NeuronMasks)


def make_model(directory):
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(directory)
