"""What a published card tells: scores, training and identification, and no directory of its author."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

import neuron_specialization as ns
from neuron_specialization.baselines.bottleneck import bottleneck_adapters
from neuron_specialization.baselines.ffn_copies import ffn_copies
from neuron_specialization.baselines.lass import lass, magnitude_masks
from neuron_specialization.export.hub import facts_from_results
from neuron_specialization.neurons.card import describe_adapter, is_edited, keep_card_of_hub, render_card
from neuron_specialization.neurons.card_sections import CardFacts
from neuron_specialization.neurons.lora_card import describe_lora
from neuron_specialization.translation.checkpoints import new_model

from .conftest import make_m2m100, make_masks

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


def test_a_base_of_another_directory_is_not_taken_for_one_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "here" / "checkpoints" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    masks = make_masks(make_m2m100())
    masks.base_model_name_or_path = "checkpoints/small"
    masks.save_pretrained("masks")
    assert ns.NeuronMasks.from_pretrained("masks") == masks
    monkeypatch.chdir(tmp_path)
    ns.NeuronMasks.from_pretrained("here/masks").save_pretrained("copied")
    card = Path("copied", "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.base_model is None and "checkpoints/small" not in card


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
        ("data/tatoeba/{pair}.parquet", "tatoeba/{pair}.parquet", "unknown"),
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
    assert f"## Evaluation\n\nOn `{told}`, 5 beams:\n\n| direction |" in text and ModelCard(text).data.datasets == [
        "me/training"
    ]


def test_scores_are_read_from_a_stage_of_a_comparison_too(tmp_path):
    row = {"method": "ours", "seed": 0, "direction": "en-de", "loss": 2.9, "bleu": 33.626, "chrf++": 57.234}
    signatures = {"en-de": {name: value for name, value in SCORES["en-de"].items() if "signature" in name}}
    part = {"recipe": "compare_methods", "rows": [row], "signatures": signatures}
    part |= {"translations": {"en-de": ["Ein Hund."] * 1000}}
    (tmp_path / "part.json").write_text(json.dumps(part))
    assert facts_from_results(CardFacts(), scores=tmp_path / "part.json").scores == SCORES
    (tmp_path / "part.json").write_text(json.dumps({**part, "num_beams": 1}))
    facts = facts_from_results(CardFacts(), scores=tmp_path / "part.json")
    config = {**make_masks(make_m2m100(), pairs=("en-de",)).metadata(), "trainable": "full"}
    assert "## Evaluation\n\nGreedy:\n\n| direction |" in render_card(config, {}, facts)
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
    assert "secret_project" not in (tmp_path / "adapter" / "README.md").read_text()
    describe_adapter(tmp_path / "adapter", CardFacts("me/adapter"))
    assert "secret_project" not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_base_in_a_folder_beside_is_not_taken_for_one_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_m2m100().save_pretrained("checkpoints/small")
    model = type(make_m2m100()).from_pretrained("checkpoints/small")
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), task_type="SEQ_2_SEQ_LM")
    get_peft_model(model, config).save_pretrained("adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # from where checkpoints/small could be a name on the Hub
    describe_adapter("../adapter", CardFacts("me/adapter"))
    text = Path("../adapter/README.md").read_text()
    assert ModelCard(text).data.base_model is None and 'base = "path/to/base"' in text and "me/adapter" in text


def test_results_of_another_stage_are_refused(tmp_path):
    for name, trainable in (("ours", "delta"), ("other", "low_rank")):
        config = ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100()), trainable=trainable)
        get_peft_model(make_m2m100(), config).save_pretrained(tmp_path / name / "adapter")
        (tmp_path / name / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "fine_tune" / "model").mkdir(parents=True)
    (tmp_path / "fine_tune" / "run.json").write_text(json.dumps(RUN))
    ours = tmp_path / "ours" / "adapter"
    facts = facts_from_results(CardFacts(), training=tmp_path / "ours" / "run.json", adapter=ours)
    assert facts.training["updates"] == 7
    for name, message in (("other", "which differs from"), ("fine_tune", "a model without adapter, not of")):
        for kind in ("scores", "training"):
            with pytest.raises(ValueError, match=message):
                facts_from_results(CardFacts(), **{kind: tmp_path / name / "run.json"}, adapter=ours)


def under_weight_masks(model, pairs):
    kept = magnitude_masks(model, 0.3)
    return lass(model, {name: torch.stack([rows] * len(pairs)) for name, rows in kept.items()}, pairs)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (ffn_copies, "its base was widened"),
        (under_weight_masks, "its base was put under masks of single weights"),
        (
            lambda model, pairs: bottleneck_adapters(model, pairs, 4),
            "its base was given a bottleneck after every layer",
        ),
    ],
)
def test_a_card_of_an_adapter_whose_base_was_changed_promises_no_usage(method, reason, tmp_path):
    method(make_m2m100(), ["en-de", "en-fr"]).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"**It loads onto no checkpoint**: {reason}" in text and "from_pretrained" not in text


def test_a_lora_of_a_comparison_has_a_card_whose_usage_runs_as_printed(tmp_path, toy, toy_tokenizer, run_here, capfd):
    torch.manual_seed(0)
    new_model(toy_tokenizer, 1, 16, 32, 2, 0.0, 64).save_pretrained(tmp_path / "base")
    toy_tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    stage, pair = tmp_path / "lora" / "seed-0", toy.language_pairs[0]
    get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")).save_pretrained(
        stage / "model"
    )
    part = {"recipe": "compare_methods", "rows": [{"direction": pair, "bleu": 33.626, "chrf++": 57.234}]}
    part |= {"signatures": {pair: {"bleu_signature": "b", "chrf++_signature": "c"}}, "translations": {pair: ["a"] * 9}}
    (stage / "part.json").write_text(json.dumps(part))
    (stage / "run.json").write_text(json.dumps(RUN))
    command = ["publish.py", "--adapter", str(stage / "model"), "--card_only", str(tmp_path / "card")]
    assert "do not tell its directions. Give --scores" in run_here(*command, fails=True)
    run_here(*command, "--scores", str(stage / "part.json"), "--training", str(stage / "run.json"))
    text = (tmp_path / "card" / "README.md").read_text()
    assert f"# LoRA for {pair}\n" in text and "for this direction only:" in text and str(tmp_path) not in text
    assert (
        "| r | 3 |" in text
        and "| target_modules | fc1, fc2, k_proj, out_proj, q_proj, v_proj |" in text
        and "| updates | 7 |" in text
    )
    assert f"| {pair} | 9 | 33.63 | 57.23 |" in text and "lora" in ModelCard(text).data.tags
    usage = re.search(r"## Usage\n\n```python\n(.*?)```", text, re.S)[1]
    usage = usage.replace("path/to/base", str(tmp_path / "base")).replace("path/to/adapter", str(stage / "model"))
    capfd.readouterr()
    exec(usage, {})
    assert capfd.readouterr().out.startswith("[")
    (tmp_path / "card" / "README.md").write_text(text + "\nNot for court rooms.\n")
    assert "edited by you, and kept" in run_here(*command, "--scores", str(stage / "part.json"))


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
    (tmp_path / "cards" / "mine" / "README.md").write_text(text + "\nNot for court rooms.\n")
    said = run_here("publish.py", "--adapter", "adapter", "--card_only", "cards/mine", "--license", "mit")
    assert "edited by you, and kept as it is: cards/mine/README.md" in said
    for where in ([], ["--repo", "me/mine", "--card_only", "cards"]):
        assert "Say where to publish" in run_here("publish.py", "--adapter", "adapter", *where, fails=True)


def of_masks(tmp_path):
    make_masks(make_m2m100(), pairs=("en-de",)).save_pretrained(tmp_path / "adapter")
    return lambda license: describe_adapter(tmp_path / "adapter", CardFacts(license=license))


def of_lora(tmp_path):
    lora = LoraConfig(r=3, target_modules=["fc1"], task_type="SEQ_2_SEQ_LM")
    get_peft_model(make_m2m100(), lora).save_pretrained(tmp_path / "adapter")
    return lambda license: describe_lora(tmp_path / "adapter", CardFacts(license=license, scores=SCORES))


def of_hub(tmp_path):
    write = of_masks(tmp_path)

    class Hub:
        def hf_hub_download(self, *_):
            (tmp_path / "on_hub.md").write_text("Mine.\n" * 99)
            return tmp_path / "on_hub.md"

    return lambda license: write(license) if license == "mit" else keep_card_of_hub(Hub(), "me", tmp_path / "adapter")


@pytest.mark.parametrize("way", [of_masks, of_lora, of_hub], ids=lambda way: way.__name__)
def test_a_card_that_is_cut_off_in_writing_leaves_the_old_one(tmp_path, monkeypatch, way):
    write, adapter = way(tmp_path), tmp_path / "adapter"
    write("mit")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}

    def cut_off(name):
        whole = getattr(Path, name)

        def write_half(path, content, **options):
            if path.parent != adapter:
                return whole(path, content, **options)
            whole(path, content[: len(content) // 2], **options)
            raise OSError("No space left on device")

        return write_half

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        for name in ("write_text", "write_bytes"):
            patch.setattr(Path, name, cut_off(name))
        write("apache-2.0")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert not is_edited(adapter / "README.md")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_committed_cards_are_as_they_were_written(path):
    text, trained, lora = path.read_text(), "-identified" not in path.parent.name, "-lora" in path.parent.name
    assert not is_edited(path) and "More Information Needed" not in text
    assert ("BLEU: `nrefs" in text) == ("| updates |" in text) == trained and not re.search(r"[\s\"'`({]/\w", text)
    changed = any(word in path.parent.name for word in ("-ffn-copies", "-lass", "-adapter-", "-untrained"))
    assert ("It loads onto no checkpoint" in text) == changed and (path.parent / "kept_neurons.svg").is_file() != lora
    uncounted = path.parent.name.startswith(("tatoeba-sequential", "tatoeba-pruning")) or (changed and trained) or lora
    assert ("| counted on |" in text) != uncounted


@pytest.fixture(scope="module")
def committed_scores():
    """Result, method, seed, order → direction → its scores as cards print them, of every committed comparison."""
    found = {}
    for path in sorted((ROOT / "recipes" / "results").glob("**/results.json")):
        for row in json.loads(path.read_text()).get("rows", []):
            if row.get("bleu") is not None and "direction" in row:
                pruned = "-".join(row.get(key, "") for key in ("when", "criterion", "scope"))
                result = "-".join(path.relative_to(ROOT / "recipes" / "results").parts[:-1])
                run = (result, pruned.strip("-") or row.get("method"), row.get("seed"), row.get("order"))
                found.setdefault(run, {})[row["direction"]] = (f"{row['bleu']:.2f}", f"{row['chrf++']:.2f}")
    return found


SCORED_ALONE = ("adding-pairs", "continued-pretraining", "multi30k-specialized")  # their results are no comparisons


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_committed_cards_have_the_scores_of_the_run_in_their_name(path, committed_scores):
    name = path.parent.name
    table = re.findall(r"^\| (\S+-\S+) \| \d+ \| ([\d.]+) \| ([\d.]+) \|$", path.read_text(), re.M)
    told = {direction: scores for direction, *scores in table}
    assert bool(told) == ("-identified" not in name)
    if told and not name.startswith(SCORED_ALONE):
        runs = [run for run, of in committed_scores.items() if all(list(of.get(d, ())) == s for d, s in told.items())]
        assert any(is_named(name, *run[:3]) for run in runs), runs


WITHOUT_ADAPTER = ("baseline", "masks_only", "fine_tune", "bilingual")  # these and their variants keep none


def test_every_adapter_of_a_committed_comparison_has_a_card():
    table = r"^\| (\S+-\S+) \| \d+ \| ([\d.]+) \| ([\d.]+) \|$"
    cards = [set(re.findall(table, path.read_text(), re.M)) for path in CARDS]
    for path in sorted((ROOT / "recipes" / "results").glob("**/results.json")):
        results, trained = json.loads(path.read_text()), {}
        for row in results.get("rows", []) if results.get("recipe") == "compare_methods" else []:
            if not row["method"].startswith(WITHOUT_ADAPTER):
                told = (row["direction"], f"{row['bleu']:.2f}", f"{row['chrf++']:.2f}")
                trained.setdefault((row["method"], row["seed"]), set()).add(told)
        for run, rows in trained.items():  # one card, or one for each direction
            assert set().union(*(card for card in cards if card <= rows)) == rows, (path, run)


def is_named(name, result, method, seed):
    end = re.sub("[_=]", "-", method) + (f"-seed-{seed}" if seed else "")
    words = set(result.split("-")) - {"baseline", "updates"}
    has_same = all((word in result) == (word in name) for word in ("short", "4500"))
    return end in name and ("-seed-" in end) == ("-seed-" in name) and words <= set(name.split("-")) and has_same
