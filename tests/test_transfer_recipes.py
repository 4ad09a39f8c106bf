"""The recipes about sequential transfer, one after another on toy languages, and what they refuse."""

import json
import re
import shutil

import pytest
from datasets import Dataset

from neuron_specialization.analysis import mass_recording
from neuron_specialization.translation.checkpoints import load_checkpoint

TRANSFER = """
language_pairs: [Pv-Aa, Pv-Ba]
orders: [Pv-Aa/Pv-Ba]
compare: [joint, masks]
freeze: [encoder]
pretraining_updates: 2
max_steps: 2
max_sentences: 24
vocab_size: 300
layers: 1
d_model: 16
d_ff: 32
heads: 2
activation: gelu
tie_embeddings: false
evaluations: 1
num_beams: 1
max_length: 64
per_device_train_batch_size: 8
per_device_eval_batch_size: 40
disable_tqdm: true
use_cpu: true
dataloader_pin_memory: false
"""


@pytest.fixture
def options(toy_files, tmp_path):
    (tmp_path / "transfer.yaml").write_text(TRANSFER)
    files = [
        word for split in ("train", "validation", "test") for word in (f"--{split}_file", f"{toy_files}/{split}.jsonl")
    ]
    return ["--config", str(tmp_path / "transfer.yaml"), *files]


def test_transfer_pruning_and_mass_follow_each_other(run_here, options, tmp_path, monkeypatch):
    where = ["--transfer_dir", str(tmp_path / "transfer")]
    printed = run_here("transfer_sequentially.py", *options, "--output_dir", str(tmp_path / "transfer"))
    results = json.loads((tmp_path / "transfer" / "results.json").read_text())
    assert len(results["rows"]) == 2 * 6 and results["transfer"]["bleu"] and "BLEU after each step" in printed
    (overlap,) = results["mask overlap"]
    assert (overlap["pair"], overlap["other"]) == ("Pv-Aa", "Pv-Ba") and "IoU of the neurons" in printed
    assert all(0 < overlap[f"model.{stack}.layers.0.fc1"] <= 1 for stack in ("encoder", "decoder"))
    assert (tmp_path / "transfer" / "matrix.png").is_file() and (tmp_path / "transfer" / "tables.md").is_file()
    drawn = re.findall("<!-- (.*?) -->", (tmp_path / "transfer" / "matrix.svg").read_text())
    for method in ("sequential", "masks"):
        assert f"BLEU after each step, {method}, seed 0" in printed and f"{method}: Pv-Aa → Pv-Ba" in drawn
    assert [(row["pair"], row["sentence_pairs"]) for row in results["data"]] == [("Pv-Aa", 24), ("Pv-Ba", 24)]

    pruned = ["--criteria", "most_negative", "unspecialized:Pv-Aa", "mass_matched:most_positive", "--rates", "0.25"]
    pruned += ["--draws", "1", "--export", "least_activated=0.5", "least_activated=0.25"]
    pruned += ["--output_dir", str(tmp_path / "pruned")]
    run_here("prune.py", *options, *where, *pruned)
    table = json.loads((tmp_path / "pruned" / "results.json").read_text())["tables"]["bleu"]
    assert [row["criterion"] for row in table if row["pruned"] == 0][:1] == ["none"] and len(table) == 4
    assert list((tmp_path / "pruned").glob("*.svg"))
    exported = [load_checkpoint(str(of.parent))[0] for of in (tmp_path / "pruned" / "exported").rglob("config.json")]
    assert sorted(model.config.encoder_ffn_dim for model in exported) == [16, 24]
    shutil.rmtree(tmp_path / "pruned" / "exported")
    run_here("prune.py", *options, *where, *pruned, "--tables_only", "true")
    assert json.loads((tmp_path / "pruned" / "results.json").read_text())["tables"]["bleu"] == table
    assert not (tmp_path / "pruned" / "exported").exists(), "the tables alone"

    more = ["--criteria", "most_activated", "--rates", "0.25", "--when", "before", "retrained"]
    more += ["--scopes", "layer", "global", "--steps", "1", "--retraining_updates", "1"]
    run_here("prune.py", *options, *where, *more, "--output_dir", str(tmp_path / "more"))
    rows = json.loads((tmp_path / "more" / "results.json").read_text())["rows"]
    models = {(row["when"], row["criterion"], row["scope"]): (row["step"], row["updates"]) for row in rows}
    chosen = [("none", "layer"), ("most_activated", "layer"), ("most_activated", "global")]
    assert models == {
        (when, *each): (1, updates) for when, updates in (("before", 2), ("retrained", 1)) for each in chosen
    }

    stage = (
        tmp_path / "more" / "seed-0" / "sequential" / "Pv-Aa" / "retrained" / "most_activated" / "layer-0.25-draw-0"
    )
    told = ["--adapter", stage / "adapter", "--scores", stage / "part.json", "--training", stage / "run.json"]
    run_here("publish.py", *map(str, told), "--card_only", str(tmp_path / "card"))
    card = (tmp_path / "card" / "README.md").read_text()
    assert 'criterion="most_activated"' in card and "| updates | 1 |" in card and "| Pv-Ba | " in card

    mass = [*options, *where, "--output_dir", str(tmp_path / "mass"), "--tagged_file"]
    error = run_here("mass_activation.py", *mass, options[-1], fails=True)
    assert "lacks text, tokens, upos" in error and not (tmp_path / "mass").exists()

    words = [["ba", "ku"], ["ku"]]
    rows = [{"text": " ".join(each), "tokens": each, "upos": ["NOUN", "VERB"][: len(each)]} for each in words]
    Dataset.from_list(rows).to_parquet(tmp_path / "tagged.parquet")
    printed = run_here("mass_activation.py", *mass, str(tmp_path / "tagged.parquet"))
    assert re.search(r"credit by token: (\d+) of \1 tokens are tracked", printed)
    results = json.loads((tmp_path / "mass" / "results.json").read_text())
    assert {row["feature"] for row in results["predictors"]} == {"positive", "negative", "balance", "alive", "length"}
    assert [row["compared"] for row in results["growth"]] == ["pooled", "within steps"]
    models = ["share of tokens", "pre-trained", "+ Pv-Aa", "+ Pv-Ba", "joint"]
    assert [row["model"] for row in results["tags"]] == models
    assert all(row["NOUN"] + row["VERB"] == pytest.approx(1) for row in results["tags"])
    assert len(results["changes"]) == 2 * 2 and results["attribution"] and len(results["steps"]) == 2 * 2
    figures = {path.stem for path in (tmp_path / "mass" / "figures").glob("*.png")}
    assert figures == {"mass", "alive", "change", "tokens", "attention", "tags"}
    for each in ("transfer", "pruned", "mass"):
        settings = json.loads((tmp_path / each / "results.json").read_text())["settings"]
        assert settings["data"]["max_sentences"] == 24 and settings["training"]["per_device_train_batch_size"] == 8
        assert settings["plan"]["freeze"] == ["encoder"] and {"noise", "start"} < settings.keys()

    # the residual stream is narrower, so that credit by more tokens fits than for neurons
    monkeypatch.setattr(mass_recording, "MOST_CELLS", 2 * 2 * 16 * 301)
    narrow = [*options, *where, "--site", "residual", "--output_dir", str(tmp_path / "residual")]
    assert re.search(r"credit by token: (\d+) of \1 tokens", run_here("mass_activation.py", *narrow))
    assert json.loads((tmp_path / "residual" / "results.json").read_text())["attribution"]

    other = shutil.copytree(tmp_path / "transfer", tmp_path / "other")
    part = other / "seed-0" / "joint" / "part.json"
    changed = json.loads(part.read_text())
    changed["rows"][0]["loss"] += 1e-9
    part.write_text(json.dumps(changed))
    moved = ["--transfer_dir", str(other), "--output_dir", str(tmp_path / "mass")]
    error = run_here("mass_activation.py", *options, *moved, fails=True)
    assert "holds stages with other settings (losses of seed 0, joint)" in error


@pytest.mark.parametrize(
    ("recipe", "wrong", "message"),
    [
        ("transfer_sequentially.py", ["--freeze", "encodr"], "nothing in this model is called 'encodr'"),
        ("transfer_sequentially.py", ["--orders", "Pv-Aa"], "orders holds the language pairs"),
        ("transfer_sequentially.py", ["--swap", "1.5"], "swap is a share in [0, 1)"),
        ("transfer_sequentially.py", ["--seed", "1"], "has no option --seed"),
        ("transfer_sequentially.py", ["--data_seed", "1"], "has no option --data_seed"),
        ("prune.py", ["--transfer_dir", "nowhere"], "run transfer_sequentially.py first"),
        ("prune.py", ["--transfer_dir", "nowhere", "--export", "dead=x"], "Expected criterion=rate to export"),
        ("mass_activation.py", ["--transfer_dir", "nowhere", "--site", "head"], "site must be one of pre_activation"),
    ],
)
def test_bad_input_is_one_sentence(recipe, wrong, message, run_here, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = run_here(recipe, *options, "--output_dir", "out", *wrong, fails=True)
    assert error.splitlines()[-1].startswith("Error: ") and message in error
    assert not list(tmp_path.rglob("*.safetensors"))
