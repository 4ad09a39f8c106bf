"""Command lines: options from files and flags, a short help, errors of one sentence."""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from neuron_specialization.translation.arguments import DataArguments, ModelArguments, as_mapping
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.results import write_results
from neuron_specialization.translation.trainer import SpecializationTrainingArguments

RECIPES = Path(__file__).parent.parent / "recipes"
UNUSED = ("train_file", "drop_faulty")


@dataclass
class Arguments:
    """What a test needs."""

    name: str = field(metadata={"help": "A required one."})
    quick: bool = field(default=True, metadata={"help": "On by default."})


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text)
        return str(tmp_path / "config.yaml")

    return write


@pytest.mark.parametrize("joined", [True, False])
def test_a_file_gives_options_and_the_command_line_wins(config, joined):
    file = config(
        "name: -x\nquick: false\nlanguage_pairs: [en-de, de-en]\nlanguage_tokens: {en: eng_Latn, de: deu_Latn}\n"
        "max_sentences: 7\npivot:\ncolumns: {}\n"
    )
    words = [f"--config={file}"] if joined else ["--config", file]
    args, data = parse(Arguments, DataArguments, argv=["--max_sentences", "3", *words, "--language_pairs", "en-fr"])
    assert (args.name, args.quick) == ("-x", False)
    assert data.language_pairs == ["en-fr"] and data.max_sentences == 3 and data.pivot is None and data.columns == []
    assert data.tokens == {"en": "eng_Latn", "de": "deu_Latn"}
    (args, _) = parse(Arguments, DataArguments, argv=[*words, "--quick", "--name=later"])
    assert (args.name, args.quick) == ("later", True)


def test_a_file_may_map_names_to_lists(config):
    file = config("name: x\ncolumns: {high: [de, fr], low: [vi]}\ntrain_sentences: {vi: 3000}\n")
    (_, data) = parse(Arguments, DataArguments, argv=["--config", file])
    assert data.columns == ["high=de,fr", "low=vi"] and data.train_sentences == ["vi=3000"]


def test_the_trainer_reads_its_dictionaries_from_a_file(config, tmp_path):
    file = config(f"output_dir: {tmp_path}\nlr_scheduler_kwargs: {{num_cycles: 2}}\nmax_steps: -1\nuse_cpu: true\n")
    (training,) = parse(SpecializationTrainingArguments, argv=["--config", file])
    assert training.lr_scheduler_kwargs == {"num_cycles": 2} and training.max_steps == -1 and training.use_cpu


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nane", "x"], r"no option --nane; the nearest is --name"),
        (["--name", "x", "--max_lenght=3"], r"no option --max_lenght; the nearest is --max_length"),
        (["--name", "x", "--max_sent", "3"], r"no option --max_sent; the nearest is --max_sentences"),
        (["--name", "x", "--train_file", "a.tsv"], r"no option --train_file; the nearest is --validation_file"),
        (["--name", "x", "--train-file", "a.tsv"], r"no option --train-file; the nearest is --validation_file"),
        (["--name", "x", "a.tsv"], r"Unexpected a.tsv"),
        (["--quick"], r"required: --name"),
        (["--name", "x", "--max_length", "many"], r"--max.length: invalid int value: 'many'"),
        (["--name", "x", "--max_length", "0"], r"max_length is a number of at least 1, got 0"),
        (["--config"], r"--config expects the path"),
        (["--config", "missing.yaml"], r"no configuration file missing.yaml"),
    ],
)
def test_options_that_a_recipe_does_not_use_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(Arguments, DataArguments, unused=UNUSED, argv=argv)


def test_a_name_has_one_value():
    assert as_mapping(["de=deu_Latn", "en=a=b"]) == {"de": "deu_Latn", "en": "a=b"}
    with pytest.raises(ValueError, match="de is named twice in de=a en=c de=b"):
        as_mapping(["de=a", "en=c", "de=b"])


def test_options_of_the_trainer_that_would_do_nothing_are_refused():
    for option in ("--num_train_epochs", "--resume_from_checkpoint", "--save_steps", "--auto_find_batch_size"):
        with pytest.raises(ValueError, match=f"no option {option}"):
            parse(SpecializationTrainingArguments, argv=["--output_dir", "x", option, "5"])
    (training,) = parse(
        SpecializationTrainingArguments, argv=["--output_dir", "x", "--use_cpu", "true", "--weight_decay", "0.5"]
    )
    assert training.weight_decay == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nlanguage_pair: [en-de]", r"config.yaml: .* no option --language_pair; .* --language_pairs"),
        ("name: x\ntrain_file: a.tsv", r"config.yaml: .* no option --train_file; the nearest is --validation_file"),
        ("name: x\nconfig: y", r"cannot name another"),
        ("name: x\ncolumns: {no: nor}", r"quote the words of columns; YAML reads no"),
        ("name: x\ncolumns: {high: [de, no]}", r"quote the words of columns; YAML reads no"),
        ("name: x\nlanguage_pairs: [no, en-de]", r"quote the words of language_pairs; YAML reads no"),
        ("name: x\npivot: no", r"quote the words of pivot; YAML reads no"),
        ("just words", r"Expected lines such as .* got 'just words'"),
        ("name: [x", r"is not a YAML file: while parsing"),
    ],
)
def test_keys_that_a_recipe_does_not_use_are_refused(config, text, message):
    with pytest.raises(ValueError, match=message):
        parse(Arguments, DataArguments, unused=UNUSED, argv=["--config", config(text)])


def test_help_shows_ours_and_all_of_the_trainers_only_when_asked(capsys):
    shown = {}
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stopped:
            parse(
                *(Arguments, ModelArguments, DataArguments, SpecializationTrainingArguments),
                unused=UNUSED,
                argv=[option],
            )
        assert stopped.value.code == 0
        shown[option] = capsys.readouterr().out
    short, everything = shown.values()
    lines = [len(text.partition("options:")[2].splitlines()) for text in (short, everything)]  # above: who calls
    assert lines[0] < 97 and lines[1] > 100
    for text in (
        "--config FILE.yaml",
        "--help_all",
        "--name NAME",
        "--temperature",
        "--language_pairs",
        "--max_steps",
    ):
        assert text in short and text in everything
    assert "--train_file" not in everything and "--bf16 " in everything and "--bf16 " not in short
    assert short.index("What a test needs") < short.index("--name") < short.index("--temperature")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_the_command_that_help_shows_can_be_pasted(recipe):
    """It runs over several lines, which a docstring joins unless it is raw."""
    text = ast.get_docstring(ast.parse(recipe.read_text()))
    commands = [part.splitlines() for part in text.split("\n\n") if f"recipes/{recipe.name}" in part]
    assert commands, "each recipe shows one"
    for lines in commands:
        assert lines[0].startswith(("accelerate launch", "python")) and max(map(len, lines)) < 120
        assert all(line.endswith(" \\") for line in lines[:-1]) and not lines[-1].endswith("\\")


def fail_in_zip():
    list(zip([1], [1, 2], strict=True))


def fail_on_a_file():
    open("/missing/file").close()


def fail_for_a_pair():
    from neuron_specialization.neurons.language_pairs import split_pair

    split_pair("en_de")


def test_an_interruption_shows_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(interrupted)
    assert ended.value.code == 130 and "Interrupted. The same command goes on" in capsys.readouterr().err


def test_who_reads_the_output_may_stop_before_its_end():
    code = "from neuron_specialization.translation.command_line import run; run(lambda: print('line\\n' * 100_000))"
    command = f'{sys.executable} -c "{code}" | head -1'
    printed = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (printed.stdout, printed.stderr) == ("line\n", "")


def test_foreseen_errors_end_with_one_sentence_and_others_keep_their_traceback(capsys, monkeypatch):
    for main, message in ((fail_for_a_pair, "en_de"), (fail_on_a_file, "/missing/file")):
        with pytest.raises(SystemExit) as stopped:
            run(main)
        assert stopped.value.code == 1
        printed = capsys.readouterr()
        assert (
            printed.err.startswith("Error: ")
            and message in printed.err
            and printed.err.count("\n") == 1
            and not printed.out
        )
    with pytest.raises(ValueError, match="zip"):
        run(fail_in_zip)
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises(ValueError, match="zip"):
        run(fail_in_zip)


@dataclass
class Output:
    """Where a test writes."""

    output_dir: str = field(metadata={"help": "A directory."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what stands there."})


@pytest.mark.parametrize("name", ["results of another recipe", "a file of the user's"])
def test_results_of_others_are_not_replaced(monkeypatch, tmp_path, name):
    monkeypatch.setattr(sys, "argv", ["recipes/specialize.py"])
    if name == "a file of the user's":
        (tmp_path / "results.json").write_text("[1, 2]")
    else:
        write_results(tmp_path, {"updates": 3})
        parse(Output, argv=["--output_dir", str(tmp_path)])
        write_results(tmp_path, {"updates": 4})
    monkeypatch.setattr(sys, "argv", ["recipes/score.py"])
    with pytest.raises(
        ValueError, match="results.json, written by (specialize|something else), and score would replace"
    ):
        parse(Output, argv=["--output_dir", str(tmp_path)])
    parse(Output, argv=["--output_dir", str(tmp_path), "--overwrite_output_dir", "true"])


CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
MODEL, TRAIN, VALIDATION, TEST = (
    (f"--{name}", f"nowhere/{{pair}}.{name}.parquet")
    for name in ("model_name_or_path", "train_file", "validation_file", "test_file")
)
MISSING = {  # options that a configuration leaves to the command line, naming what does not exist
    "analyze": ("--overlap", "--masks", "a=nowhere"),
    "benchmark_data": (*TRAIN, *VALIDATION, *TEST),
    "compare_methods": (*MODEL, *TRAIN, *VALIDATION, *TEST),
    "compare_representations": ("--models", "a=nowhere", "--test_file", "nowhere.parquet"),
    "continue_pretraining": (*MODEL, *TRAIN, *VALIDATION, *TEST),
    "explain": (*MODEL, *VALIDATION, "--gradients", "true"),
    "identify": (*MODEL, *VALIDATION),
    "prepare_text": ("--data_dir", "nowhere"),
    "pretrain": (*TRAIN, *VALIDATION),
    "reidentify": (*MODEL, *VALIDATION, *TRAIN),
    "score": (*MODEL, *TEST),
    "specialize": (*MODEL, *TRAIN, *VALIDATION, "--masks", "nowhere"),
    "transfer_cross_lingually": ("--models", "a=nowhere", "--data_dir", "nowhere"),
    "transfer_sequentially": (*TRAIN, *VALIDATION, *TEST),
}
SECOND = {  # those that complete another one
    "continue_pretraining/large": "small",
    "pretrain/denoising-large": "denoising",
    **{f"transfer_cross_lingually/{name}": "small" for name in ("mbart50", "nllb", "twelve")},
}


@pytest.mark.parametrize(
    "file",
    [path for name in MISSING for path in sorted((CONFIGS / name).glob("*.yaml"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_configuration_fits_its_recipe(run_here, tmp_path, file):
    """Its options are known and of the right types: what stops the run is that the text or the model is missing."""
    recipe = file.parent.name
    first = SECOND.get(f"{recipe}/{file.stem}")
    configs = ("--config", str(file.with_stem(first))) if first else ()
    words = (*configs, "--config", str(file), *MISSING[recipe], "--output_dir", str(tmp_path / "out"))
    assert "nowhere" in run_here(f"{recipe}.py", *words, fails=True).rpartition("\nError: ")[2]


def test_results_are_json_that_every_reader_takes(tmp_path):
    numbers = {"loss": float("nan"), "deep": [{"p": (1.5, float("inf"))}], "n": 3}
    path = write_results(tmp_path, numbers)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert {name: found[name] for name in numbers} == {"loss": None, "deep": [{"p": [1.5, None]}], "n": 3}
