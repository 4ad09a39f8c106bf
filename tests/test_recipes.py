"""The recipes as users run them: files in and out, and separate processes where these matter."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from safetensors.torch import load_file

import neuron_specialization as ns
from neuron_specialization.analysis.shapes import NLLB_SHAPES
from neuron_specialization.export import ctranslate2
from neuron_specialization.translation.checkpoints import load_checkpoint, new_m2m100

ROOT = Path(__file__).parent.parent
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
PAIRS = ["Pv-Aa", "Aa-Pv", "Pv-Ba", "Ba-Pv"]


CPU = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
CPU["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where mpirun is


def free_port() -> str:
    """A free port, so that several suites can run on one machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


PORT = ["--main_process_port", free_port()]


def launch_options(processes: int) -> list[str]:
    """Options of accelerate that start this many processes on the CPU, several of them with mpirun."""
    several = ["--mpirun_hostfile", str(ROOT / "tests" / "distributed" / "hosts")] if processes > 1 else []
    return ["--cpu", *several, *PORT, "--num_processes", str(processes), "--num_machines", "1", *NO_CONFIG]


NO_CONFIG = ["--mixed_precision", "no", "--dynamo_backend", "no"]


def run(recipe: str, *arguments: str, processes: int = 1, fails: bool = False, stdin: str | None = None) -> str:
    """Run one recipe with accelerate and return what it printed."""
    command = [ACCELERATE, "launch", "--quiet", *launch_options(processes), str(ROOT / "recipes" / recipe)]
    environment = {**os.environ, **CPU}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=240, input=stdin
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def identified(workspace, toy_files, toy_checkpoint):
    output = run(
        "identify.py",
        *("--model_name_or_path", str(toy_checkpoint), "--validation_file", str(toy_files / "validation.jsonl")),
        *("--language_pairs", *PAIRS, "--output_dir", str(workspace / "masks"), "--k", "0.7"),
        *("--stability", "true", "--parts", "4", "--batch_size", "8", "--report", str(workspace / "report.html")),
    )
    return workspace / "masks", output


def test_identify_writes_masks_counts_and_a_report(identified, workspace, toy_files, toy_checkpoint, run_here):
    directory, output = identified
    masks = ns.NeuronMasks.from_pretrained(directory)
    assert masks.language_pairs == PAIRS and masks.selector["k"] == 0.7
    counts = ns.ActivationCounts.load(directory / "counts.safetensors")
    again = ns.CumulativeThreshold(0.7).select(counts)
    assert all(again.rows[name].equal(rows) for name, rows in masks.rows.items())
    results = json.loads((directory / "results.json").read_text())
    block = next(iter(masks.rows))
    assert results["kept"]["Pv-Aa"][block] == pytest.approx(1 - masks.sparsity("Pv-Aa")[block])
    assert f"{results['kept']['Pv-Aa'][block]:.2f}" in output and block in output
    assert results["environment"]["torch"] and set(results["stability"]["halves"]) == set(PAIRS)
    assert "IoU of split halves" in output
    overlap = output.partition("overlap of the pairs' neurons in the decoder")[2]
    assert f"{results['overlap']['decoder']['Pv-Aa']['Pv-Ba']:.2f}" in re.search(r"\| Pv-Aa +\| +1.00 .*", overlap)[0]
    assert (directory / "overlap.svg").read_text().lstrip().startswith("<?xml")
    before = (directory / "adapter_model.safetensors").read_bytes()
    options = ("--language_pairs", *PAIRS, "--output_dir", str(directory), "--k", "0.7", "--stability", "true")
    options += ("--model_name_or_path", str(toy_checkpoint), "--validation_file", str(toy_files / "validation.jsonl"))
    assert f"wrote {directory}" in run_here("identify.py", *options, "--parts", "4"), "what it wrote may be replaced"
    assert (directory / "adapter_model.safetensors").read_bytes() == before
    page = (workspace / "report.html").read_text()
    assert all(pair in page for pair in PAIRS) and "CumulativeThreshold (k=0.7)" in page and "overlap, encoder" in page


def test_masks_of_random_weights_are_not_taken_for_those_of_the_checkpoint(
    identified, workspace, toy_files, toy_checkpoint, run_here
):
    options = ("--model_name_or_path", str(toy_checkpoint), "--validation_file", str(toy_files / "validation.jsonl"))
    options += ("--language_pairs", *PAIRS, "--k", "0.7", "--untrained", "true", "--seed", "3")
    run_here("identify.py", *options, "--output_dir", str(workspace / "random"))
    masks, of_checkpoint = map(ns.NeuronMasks.from_pretrained, (workspace / "random", identified[0]))
    assert of_checkpoint.base_model_name_or_path == str(toy_checkpoint) and masks.base_model_name_or_path is None
    assert masks.selector == {**of_checkpoint.selector, "random_weights_seed": 3}
    card = (workspace / "random" / "README.md").read_text()
    assert "**It loads onto no checkpoint**: activations were counted in a model with random weights" in card
    assert "train under them first" not in card and "from_pretrained" not in card


def test_identify_by_attribution(workspace, toy_files, toy_checkpoint, run_here):
    options = ("--model_name_or_path", str(toy_checkpoint), "--validation_file", str(toy_files / "validation.jsonl"))
    options += ("--language_pairs", *PAIRS, "--k", "0.7", "--measure", "attribution")
    run_here("identify.py", *options, "--output_dir", str(workspace / "attribution"))
    model, tokenizer = load_checkpoint(str(toy_checkpoint), "float32")
    corpus = ns.load_parallel(str(toy_files / "validation.jsonl"), PAIRS)
    expected = ns.CumulativeThreshold(0.7).select(ns.record_corpus(model, tokenizer, corpus, measure="attribution"))
    masks = ns.NeuronMasks.from_pretrained(workspace / "attribution")
    assert masks.selector == expected.selector and masks.selector["measure"] == "attribution"
    assert all(rows.equal(expected.rows[name]) for name, rows in masks.rows.items())


def test_identify_gives_the_same_under_two_processes(identified, workspace, toy_files, toy_checkpoint):
    run(
        "identify.py",
        *("--model_name_or_path", str(toy_checkpoint), "--validation_file", str(toy_files / "validation.jsonl")),
        *("--language_pairs", *PAIRS, "--output_dir", str(workspace / "masks-2"), "--k", "0.7"),
        *("--stability", "true", "--parts", "4", "--batch_size", "8"),
        processes=2,
    )
    two_processes = json.loads((workspace / "masks-2" / "results.json").read_text())["environment"]
    assert two_processes["processes"] == 2, "this must not be a run of one process"
    for name in ("counts.safetensors", "adapter_model.safetensors"):
        one, two = (load_file(directory / name) for directory in (identified[0], workspace / "masks-2"))
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    assert ns.ActivationCounts.load(identified[0] / "counts.safetensors").tokens["encoder"].sum() > 0


@pytest.mark.parametrize("masks", ["masks", "none"])
def test_specialize_then_evaluate_then_translate(identified, workspace, toy_files, toy_checkpoint, run_here, masks):
    output = workspace / f"run-{masks}"
    run(
        "specialize.py",
        *("--config", str(ROOT / "recipes" / "configs" / "specialize" / "multi30k.yaml")),
        *("--language_tokens", "Pv=Pv", "--language_pairs", *PAIRS, "--model_name_or_path", str(toy_checkpoint)),
        *("--masks", "none" if masks == "none" else str(identified[0])),
        *("--train_file", str(toy_files / "train.jsonl"), "--validation_file", str(toy_files / "validation.jsonl")),
        *("--output_dir", str(output), "--max_steps", "4", "--per_device_train_batch_size", "8", "--eval_steps", "2"),
    )
    trained = json.loads((output / "results.json").read_text())
    assert trained["updates"] == 4 and trained["best_validation_loss"] > 0
    if masks == "masks":
        card = (output / "adapter" / "README.md").read_text()
        assert "| updates | 4 |" in card and "| per_device_train_batch_size | 8 |" in card
        assert "| counted on |" in card, "by identify, whose results lie beside the masks"
    where = ["--model_name_or_path", str(toy_checkpoint), "--adapter", str(output / "adapter")]
    if masks == "none":
        where = ["--model_name_or_path", str(output / "model")]
    score = run_here if masks == "masks" else partial(run, processes=2)
    printed = score(
        "score.py",
        *where,
        *(
            "--test_file",
            str(toy_files / "test.jsonl"),
            "--language_pairs",
            *PAIRS,
            "--pivot",
            "Pv",
            "--num_beams",
            "2",
        ),
        *("--output_dir", str(output / "scores"), "--max_sentences", "6"),
    )
    scores = json.loads((output / "scores" / "results.json").read_text())
    assert scores["environment"]["processes"] == (2 if masks == "none" else 1)
    assert set(scores["directions"]) == set(PAIRS) and "mean one-to-many" in printed
    assert "nw:2" in scores["directions"]["Pv-Aa"]["chrf++_signature"]
    translated = (output / "scores" / "translations" / "Pv-Aa.txt").read_text().splitlines()
    assert len(translated) == 6
    source = [json.loads(line)["Pv"] for line in (toy_files / "test.jsonl").read_text().splitlines()[:6]]
    source.insert(1, "")
    translated.insert(1, "")
    options = ["--pair", "Pv-Aa", "--num_beams", "2", "--batch_size", "2"]
    if masks == "none":
        options += ["--output", str(output / "new" / "translated.txt")]
        run("translate.py", *where, *options, stdin="\n".join(source), processes=2)
        assert (output / "new" / "translated.txt").read_text().splitlines() == translated
    else:
        text = run_here("translate.py", *where, *options, stdin="\n".join(source))
        assert text.splitlines() == translated
        told = ["--training", f"{output}/run.json", "--scores", f"{output}/scores/results.json"]
        told += ["--identification", f"{identified[0]}/results.json", "--card_only", f"{output}/card"]
        run_here("publish.py", "--adapter", f"{output}/adapter", *told)
        base = {**scores, "arguments": [{**part, "adapter": None} for part in scores["arguments"]]}
        for name, other in {"base": base, "other": {**scores, "adapter_digest": "0"}}.items():
            (output / f"{name}.json").write_text(json.dumps({**other, "recipe": "score"}))
            told[3] = f"{output}/{name}.json"
            error = run_here("publish.py", "--adapter", f"{output}/adapter", *told, fails=True)
            assert f"{name}.json has the scores of" in error
        told[3] = f"{output}/scores/results.json"
        counted = json.loads((identified[0] / "results.json").read_text())
        counted["kept"]["Pv-Aa"] = dict.fromkeys(counted["kept"]["Pv-Aa"], 0.5)
        (output / "counted.json").write_text(json.dumps({**counted, "recipe": "identify"}))
        error = run_here(
            "publish.py",
            *told,
            "--adapter",
            f"{output}/adapter",
            "--identification",
            f"{output}/counted.json",
            fails=True,
        )
        assert error.startswith("Error: ") and "counted.json tells of other masks" in error and "for Pv-Aa." in error
        ns.NeuronMasks.from_pretrained(identified[0]).factorize().save_pretrained(output / "factorized")
        told = ["--identification", f"{identified[0]}/results.json", "--card_only", f"{output}/factorized-card"]
        run_here("publish.py", "--adapter", f"{output}/factorized", *told)
        assert "| counted on |" in (output / "factorized-card" / "README.md").read_text(), "rows that pairs share"
        card = (output / "card" / "README.md").read_text()
        assert "test.jsonl`, 2 beams:" in card
        for line in ("| updates | 4 |", "| per_device_train_batch_size | 8 |", "| seed | 0 |", "sentence pairs |"):
            assert line in card
        assert f"| torch | {trained['environment']['torch']} |" in card and "not recorded" not in card


def test_pretrain_makes_a_checkpoint_with_its_tokenizer(workspace, toy_files, run_here):
    output = workspace / "baseline"
    printed = run(
        "pretrain.py",
        *("--train_file", str(toy_files / "train.jsonl"), "--validation_file", str(toy_files / "validation.jsonl")),
        *("--test_file", str(toy_files / "test.jsonl"), "--language_pairs", *PAIRS, "--output_dir", str(output)),
        *("--vocab_size", "400", "--layers", "1", "--d_model", "32", "--d_ff", "64", "--heads", "2"),
        *("--max_steps", "4", "--eval_steps", "2", "--patience", "1", "--per_device_train_batch_size", "8"),
    )
    assert "duplicates" in printed and "overlap" in printed
    assert json.loads((output / "results.json").read_text())["data"][0]["sentence_pairs"] == 300
    text = run_here("translate.py", "--model_name_or_path", str(output / "model"), "--pair", "Pv-Ba", stdin="ba\nbu")
    assert len(text.splitlines()) == 2


def test_export_writes_a_checkpoint_and_a_ctranslate2_model(identified, workspace, toy_files, toy_checkpoint):
    options = (
        "--model_name_or_path",
        str(toy_checkpoint),
        "--adapter",
        str(identified[0]),
        "--pair",
        "Pv-Aa",
        "--num_beams",
        "2",
    )
    options += ("--test_file", str(toy_files / "test.jsonl"))
    run("export.py", *options, "--quantization", "int8", "--output_dir", str(workspace / "export"))
    exports = json.loads((workspace / "export" / "results.json").read_text())["exports"]
    base, checkpoint, converted = exports
    assert checkpoint["identical"] == 1.0 and base["BLEU"] == checkpoint["BLEU"] > 0
    assert converted["parameters"] <= checkpoint["parameters"] < base["parameters"]
    assert converted["MB"] < checkpoint["MB"] < base["MB"]

    trimmed = workspace / "trimmed"
    printed = run(
        *("export.py", *options, "--trim_vocabulary", str(toy_files / "train.jsonl"), "--quantization", "int8"),
        *("--output_dir", str(trimmed)),
    )
    results = json.loads((trimmed / "results.json").read_text())
    assert "vocabulary: " in printed and results["vocabulary"]["unknown rate"] < 0.01
    vocabulary = json.loads((trimmed / "checkpoint" / "config.json").read_text())["vocab_size"]
    assert vocabulary == results["vocabulary"]["after"] < results["vocabulary"]["before"]
    assert results["environment"]["ctranslate2"] == metadata.version("ctranslate2")
    run("export.py", *options, "--output_dir", str(trimmed), "--sample", "2")
    assert not (trimmed / "ctranslate2").exists(), "of the export before"
    base, smaller, quantized = results["exports"]
    assert smaller["parameters"] < checkpoint["parameters"] and quantized["MB"] < converted["MB"]
    assert {"identical", "BLEU"} <= smaller.keys() & quantized.keys()


def test_an_export_that_fails_leaves_nothing_that_tells_of_an_earlier_one(
    identified, tmp_path, toy_files, toy_checkpoint, run_here, monkeypatch
):
    options = ["--model_name_or_path", str(toy_checkpoint), "--adapter", str(identified[0]), "--num_beams", "1"]
    options += ["--test_file", str(toy_files / "test.jsonl"), "--sample", "2", "--quantization", "int8"]
    options += ["--output_dir", str(tmp_path / "export")]
    run_here("export.py", *options, "--pair", "Pv-Aa")
    assert {path.name for path in (tmp_path / "export").glob("[!.]*")} == {"checkpoint", "ctranslate2", "results.json"}

    def fail(*_args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(ctranslate2, "save_ctranslate2", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        run_here("export.py", *options, "--pair", "Aa-Pv")
    assert [path.name for path in (tmp_path / "export").glob("[!.]*")] == ["checkpoint"]


TINY = ("--layers", "1", "--d_model", "16", "--d_ff", "32", "--vocab_size", "60", "--batch_size", "8", "--length", "6")
HEAD = ("--head_d_model", "16", "--head_vocab_size", "60", "--head_tokens", "48")


def test_the_benchmark_measures_every_row(workspace, run_here, monkeypatch):
    from benchmark_cases import storage

    small = {"layers": 1, "d_model": 8, "d_ff": 64, "heads": 2, "vocab_size": 100}
    monkeypatch.setattr(storage, "nllb", lambda d_model: new_m2m100(**small))  # the real one takes seconds to build
    run_here("benchmark.py", "--output_dir", str(workspace / "benchmark"), *TINY, *HEAD, "--repeats", "1")
    rows = json.loads((workspace / "benchmark" / "results.json").read_text())["rows"]
    compared = {(row["what"], row.get("compared with")) for row in rows}
    assert ("training step, full, 70% kept", "dense") in compared
    assert ("mixed batch of 8 pairs, forward", "LoRA, 8 adapter_names") in compared
    threads = {row["what"].split(", ")[1] for row in rows if row["what"].startswith("CTranslate2")}
    assert ("CTranslate2 int8, threads: 1, batch 1, 5 beams", "transformers, dense") in compared
    assert len(rows) == 27 + 2 * len(threads)  # with one thread and, where there are more, with all of them
    assert all(row.get("ratio", row.get("ms")) > 0 for row in rows if row["what"].split()[0] not in ("load", "switch"))
    exported = [row for row in rows if row["what"].startswith("exported")]
    assert all(0 < row["FLOPs"] < 1 and 0 < row["bytes"] < 1 for row in exported)


def test_memory_is_computed_for_nllb_and_measured_here(workspace, run_here, monkeypatch):
    monkeypatch.delitem(NLLB_SHAPES, "NLLB 1.3B")
    run_here("memory.py", "--output_dir", str(workspace / "memory"), *TINY, *HEAD)
    results = json.loads((workspace / "memory" / "memory.json").read_text())
    rows = {(row["model"], row["trained"]): row for row in results["bytes"]}
    assert rows["NLLB 3.3B", "dense"]["weights"] / 4 == pytest.approx(3.3e9, rel=0.03)
    # 24 blocks of 4,096 neurons and 60 pairs, one bit each
    assert rows["NLLB 600M", "none"]["file"] == 24 * 4096 * 60 // 8
    assert {row["peak of a step"] for row in results["peaks"][:2]} == {"full", "delta"}
    assert [row["compared with"] for row in results["peaks"][2:]] == ["from logits"] * 2


TRANSLATE = ["translate.py", "--model_name_or_path", "{checkpoint}", "--pair", "Pv-Aa"]
SCORE = ["score.py", "--model_name_or_path", "{workspace}", "--output_dir", "{workspace}/ja", "--test_file", "{test}"]
IDENTIFY = ["identify.py", "--model_name_or_path", "x", "--validation_file", "x", "--output_dir", "{workspace}/no"]
SPECIALIZE = ["specialize.py", "--model_name_or_path", "x", "--masks", "x", "--output_dir", "{workspace}/no"]


@pytest.mark.parametrize(
    ("processes", "command", "message"),
    [
        (1, [*TRANSLATE, "--model_name_or_path", "{workspace}"], "not a checkpoint directory"),
        (1, [*TRANSLATE, "--adapter", "{workspace}/missing"], "Cannot load the adapter"),
        (
            2,
            [*TRANSLATE, "--pair", "Pv-Zz", "--output", "{workspace}/new/out"],
            "language token of the tokenizer: 'Zz'",
        ),
        (2, TRANSLATE, "Sentence 2 of Pv-Aa"),  # in one process of the two
        (1, [*TRANSLATE, "--batch_size", "1", "--output", "{workspace}/new/out"], "Sentence 2 of Pv-Aa"),  # at once
        (1, [*SPECIALIZE, "--trainable", "none"], "--trainable none trains nothing"),
        (1, [*IDENTIFY, "--stability", "true", "--parts", "1"], "--parts is 2 or more, got 1"),
        (1, [*IDENTIFY, "--measure", "attribution", "--count_padding", "true"], "leave --count_padding out"),
        (1, [*SCORE[:4], "{workspace}/report.html"], "report.html is a file; expected the path of a directory"),
        (1, [*TRANSLATE, "--num_beam", "2"], "the nearest is --num_beams"),
        (1, [*TRANSLATE, "--output", "/proc/cannot/be/made"], "/proc/cannot"),
        (1, [*SCORE, "--language_pairs", "Pv-ja", "--columns", "ja=Aa"], "neuron-specialization[ja]"),
    ],
)
def test_bad_input_ends_with_one_sentence(workspace, toy_files, toy_checkpoint, run_here, processes, command, message):
    places = {"workspace": workspace, "checkpoint": toy_checkpoint, "test": toy_files / "test.jsonl"}
    words, lines = [word.format(**places) for word in command], f"ba\n{'babu ' * 99}"
    if processes == 1:
        printed = run_here(*words, stdin=lines, fails=True)
    else:
        printed = run(*words, stdin=lines, fails=True, processes=processes)
    (error,) = [line for line in printed.splitlines() if line.startswith("Error: ")]
    assert message in error and "Traceback" not in printed
    assert not (workspace / "new").exists(), "nothing is left"


@pytest.mark.parametrize(
    ("recipe", "file", "options"),
    [
        ("toy_data.py", "train.jsonl", []),
        ("demo.py", "data/test.jsonl", ["--config", "{configs}/demo.yaml"]),
        ("score.py", "translations/Pv-Aa.txt", ["--model_name_or_path", "x", "--language_pairs", "Pv-Aa"]),
        ("identify.py", "counts.safetensors", ["--model_name_or_path", "x"]),
        ("export.py", "ctranslate2/model.bin", ["--model_name_or_path", "x", "--adapter", "x", "--pair", "Pv-Aa"]),
        ("specialize.py", "adapter/adapter_config.json", ["--model_name_or_path", "x", "--masks", "{output}/adapter"]),
    ],
)
def test_no_recipe_replaces_the_users_files(tmp_path, monkeypatch, recipe, file, options):
    """Neither outputs of the same names nor inputs."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("mine")
    words = [word.format(output=tmp_path, configs=ROOT / "recipes" / "configs") for word in options]
    monkeypatch.setattr(sys, "argv", [recipe, *words, "--output_dir", str(tmp_path)])
    main = runpy.run_path(str(ROOT / "recipes" / recipe))["main"]
    with pytest.raises(ValueError, match="did not write there|is an input, and would be written over"):
        main()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / file]
    assert (tmp_path / file).read_text() == "mine"


def test_the_comparison_runs_by_stages_and_makes_its_tables_from_those_that_are_there(
    workspace, toy_files, toy_checkpoint, run_here
):
    output = workspace / "comparison"
    compare = (
        *("compare_methods.py", "--model_name_or_path", str(toy_checkpoint), "--max_steps", "2", "--pivot", "Pv"),
        *(w for s in ("train", "validation", "test") for w in (f"--{s}_file", str(toy_files / f"{s}.jsonl"))),
        *("--language_pairs", "Aa-Pv", "Pv-Ba", "--per_device_train_batch_size", "8", "--output_dir", str(output)),
        *("--zero_shot_pairs", "Aa-Ba", "--zero_shot_sentences", "4", "--tiers", "high=Aa", "low=Ba"),
        *("--methods", "fine_tune=2", "ours=1", "--num_beams", "1", "--evaluations", "1", "--max_length", "64"),
    )
    error = run_here(*compare, "--only", "ours", "--seed", "1", fails=True)
    assert "--only ours --seed 1 is no stage of this comparison; it has fine_tune with 2 seeds" in error
    for options, message in (
        (("--only", "ours", "--tables_only", "true"), "--tables_only true runs and scores nothing"),
        (("--seed", "1"), "--seed names a stage, together with --only"),
        (("--tiers", "high=Aa", "low=Bb"), "--tiers names languages of no direction: Bb"),
        (("--pivot", "Cc"), "The pivot 'Cc' is a language of no direction"),
    ):
        assert message in run_here(*compare, *options, fails=True)
    at = compare.index("--zero_shot_pairs")
    error = run_here(*compare[:at], "--zero_shot_only", "true", *compare[at + 4 :], fails=True)
    assert "give --zero_shot_pairs" in error
    at = compare.index("--methods")
    error = run_here(*compare[:at], *compare[at + 3 :], fails=True)
    assert "There is nothing to compare" in error
    early_output = ("--output_dir", str(workspace / "early"))
    early = [*compare[: at + 1], "fine_tune_equal_seconds=1", "fine_tune=1", "ours=1", *compare[at + 3 :]]
    error = run_here(*early, "--only", "fine_tune_equal_seconds", "--seed", "0", *early_output, fails=True)
    assert "Error: Not all stages ran: fine_tune_equal_seconds, seed 0 (ValueError: " in error
    run_here(*compare, "--only", "fine_tune", "--seed", "1")
    assert [path.parent.name for path in output.rglob("part.json")] == ["seed-1"]
    printed = run_here(*compare, "--report", str(output / "report.html"))
    assert "Test loss and scores" in (output / "report.html").read_text()
    assert "== ours, seed 0" in printed and "Premise not tested" in printed and "unfinished" in printed
    assert "Baseline: unknown whether" in printed and "Updates of joint methods: 2 (fine_tune, ours)" in printed
    assert "| updates | 2 |" in (output / "ours" / "seed-0" / "adapter" / "README.md").read_text()
    results = json.loads((output / "results.json").read_text())
    assert len(results["rows"]) == 3 * 2 and len(results["stages"]) == 3
    keys = {"method", "seed", "direction", "loss", "chrf++", "bleu", "updates", "seconds"}
    assert all(keys <= row.keys() for row in results["rows"]) and set(results["significance"]["ours"]) == {
        "Aa-Pv",
        "Pv-Ba",
    }
    by_hand = [row["loss"] for row in results["rows"] if row["method"] == "ours"]
    line = next(line for line in results["Test loss and scores"] if line["method"] == "ours")
    assert line["loss all"] == pytest.approx(sum(by_hand) / len(by_hand))
    fine_tune, ours = results["By group, loss (fine_tune; of others the difference)"]
    assert ours["low O2M"] == pytest.approx(ours["all O2M"]) and "high O2M" not in ours and "high M2O" in fine_tune
    zero_shot = {line["method"]: line for line in results["Zero-shot directions"]}
    assert zero_shot.keys() == {"fine_tune", "ours", "fine_tune, through Pv"} and zero_shot["ours"]["loss"] > 0
    assert (output / "differences.svg").read_text().count("<svg") == 1


def test_toy_data_is_written_for_the_other_recipes(workspace, run_here):
    printed = run_here("toy_data.py", "--output_dir", str(workspace / "toy"), "--families", "1", "--sentences", "9")
    assert "--language_pairs Pv-Aa Pv-Ab" in printed
    assert len((workspace / "toy" / "train.jsonl").read_text().splitlines()) == 9
    assert len((workspace / "toy" / "distances.csv").read_text().splitlines()) == 1 + 6
