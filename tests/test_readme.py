"""The two things a newcomer does first: the demo, and the README's quickstart on what it made."""

import json
import re

import pytest

from .test_recipes import ROOT, run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of the same steps with fewer and smaller ones."""
    directory = tmp_path_factory.mktemp("demo")
    output = run(
        "demo.py",
        *("--config", str(ROOT / "recipes" / "configs" / "demo.yaml"), "--sentences", "200", "--held_out", "20"),
        *("--layers", "1", "--d_model", "32", "--d_ff", "64", "--pretrain_steps", "6", "--continue_steps", "3"),
        *("--eval_steps", "3", "--vocab_size", "400", "--output_dir", str(directory / "build" / "demo")),
    )
    return directory, output


def test_the_demo_compares_three_models_and_families(demo):
    directory, output = demo
    results = json.loads((directory / "build" / "demo" / "results.json").read_text())
    for name in ("baseline", "fine_tune", "specialized"):
        assert results[name]["averages"]["all"]["chrf++"] >= 0 and len(results[name]["directions"]) == 12
        assert name in output
    for stack in ("encoder", "decoder"):
        assert 0 < results["iou"][stack]["within"] <= 1 and 0 < results["iou"][stack]["across"] <= 1


def test_the_quickstart_runs_as_printed(demo, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(demo[0])
    exec(compile(code, "README.md", "exec"), {})
    assert "trainable params" in capsys.readouterr().out
    assert (demo[0] / "build" / "demo" / "quickstart" / "adapter_model.safetensors").is_file()
