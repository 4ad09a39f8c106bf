"""What a newcomer does first: the demo, and the README's examples on what it made."""

import json
import re
import shutil

import pytest
from markupsafe import escape

import neuron_specialization as ns

from .test_conventions import TEXT, m2m_model, nllb
from .test_recipes import ROOT, run

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NLLB = "facebook/nllb-200-distilled-600M"


SMALL_DEMO = (
    *("demo.py", "--config", str(ROOT / "recipes" / "configs" / "demo.yaml"), "--sentences", "200"),
    *("--held_out", "20", "--vocab_size", "400", "--layers", "1", "--d_model", "32", "--d_ff", "64"),
    *("--pretrain_steps", "6", "--continue_steps", "3", "--eval_steps", "3", "--output_dir"),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of the same steps with fewer and smaller ones."""
    directory = tmp_path_factory.mktemp("demo")
    return directory, run(*SMALL_DEMO, str(directory / "build" / "demo"))


def test_the_demo_compares_five_models_and_families(demo):
    directory, output = demo
    results = json.loads((directory / "build" / "demo" / "results.json").read_text())
    for name in ("baseline", "fine_tune", "ours", "random_overlap", "ffn_copies"):
        scores = results[name]["averages"]["all"]
        assert len(results[name]["directions"]) == 12
        assert f"| {name}" in output and f"{scores['chrf++']:.2f}" in output
    assert results["ours"]["averages"] != results["baseline"]["averages"], "training changed the model"
    report = (directory / "build" / "demo" / "report.html").read_text()
    assert all(pair in report for pair in results["ours"]["directions"]) and "fine_tune" in report
    said = "IoU of the neurons of two languages' pairs, within and across families, mean over layers"
    assert said in output and str(escape(said)) in report
    for stack in ("encoder", "decoder"):
        overlap = results[said]
        assert 0 < overlap[stack]["within"] <= 1 and 0 < overlap[stack]["across"] <= 1


def test_a_demo_that_was_interrupted_goes_on(demo, tmp_path, run_here):
    before = demo[0] / "build" / "demo"
    shutil.copytree(before, tmp_path / "demo")
    shutil.rmtree(tmp_path / "demo" / "ffn_copies")
    run_here(*SMALL_DEMO, str(tmp_path / "demo"))
    once, again = (json.loads((folder / "results.json").read_text()) for folder in (before, tmp_path / "demo"))
    assert all(once[name] == again[name] for name in ("baseline", "fine_tune", "ours", "ffn_copies"))


def test_the_examples_run_as_printed(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo[0])
    names: dict = {}
    blocks = [block for block in BLOCKS if "build/demo" in block]
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block.replace("max_steps=40", "max_steps=2"), "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert any("trainable params" in line for line in printed)
    assert (demo[0] / "build" / "demo" / "quickstart" / "adapter_model.safetensors").is_file()
    translated, generated, converted = (json.loads(line.replace("'", '"')) for line in printed[-3:])
    assert translated == generated and all(translated) and len(converted) == 2
    as_in_code = ns.translate(names["model"], names["tokenizer"], names["sentences"], "Pv-Aa", num_beams=5)
    assert translated == as_in_code


def test_the_nllb_example_runs_with_its_tokenizer(demo, monkeypatch, capsys, tmp_path):
    tokenizer, _ = nllb(tmp_path)
    m2m_model(tokenizer).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    lines = ["en\tde", *(f"{text}\t{text}" for text in TEXT)]
    (tmp_path / "parallel.tsv").write_text("\n".join(lines))
    imports = "\n".join(line for line in BLOCKS[0].splitlines() if "import" in line)
    (block,) = [block for block in BLOCKS if NLLB in block]
    names: dict = {}
    exec(compile(f"{imports}\n{block.replace(NLLB, str(tmp_path / 'checkpoint'))}", "README.md", "exec"), names)
    assert set(names["config"].language_token_ids) == {"en", "de"}
    assert capsys.readouterr().out.startswith("['")
