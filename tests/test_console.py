"""The command line of the package."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

from neuron_specialization import NeuronSpecializationConfig, console
from neuron_specialization.neurons.masks import NeuronMasks

from .conftest import make_m2m100, make_masks

RECIPES = Path(__file__).parent.parent / "recipes"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["neuron-specialization", *map(str, words)])
    console.main()


def test_every_recipe_is_listed(monkeypatch, capsys):
    run(monkeypatch, "recipes")
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "  " in line}
    scripts = {path.stem for path in RECIPES.glob("*.py") if ast.get_docstring(ast.parse(path.read_text()))}
    assert listed == scripts


@pytest.mark.parametrize("guide", ["README.md", "recipes/README.md"])
def test_every_recipe_is_in_the_guides(guide):
    text = (RECIPES.parent / guide).read_text()
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert not [name for name in console.RECIPES if name != "demo" and f"`{name}`" not in rows]
    assert "make demo" in text or "`demo`" in rows


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md", "model_cards/README.md"])
def test_links_lead_somewhere(page):
    path = RECIPES.parent / page
    links = [link for link in re.findall(r"\]\(([^)#]*)", path.read_text()) if link and "://" not in link]
    assert links and not [link for link in links if not (path.parent / link).exists()]


def test_info_tells_what_an_adapter_holds(monkeypatch, capsys, tmp_path):
    make_masks(make_m2m100()).save_pretrained(tmp_path)
    run(monkeypatch, "info", tmp_path)
    out = capsys.readouterr().out
    assert re.search("trained +none", out) and re.search("pairs +4: en-de, ", out)
    assert "CumulativeThreshold (k=0.6)" in out
    assert repr(NeuronMasks.from_pretrained(tmp_path)) in out


def test_an_adapter_whose_config_does_not_say_what_was_trained_is_described_too(monkeypatch, capsys, tmp_path):
    make_masks(make_m2m100()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["trainable"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    run(monkeypatch, "info", tmp_path)
    assert re.search("trained +not recorded", capsys.readouterr().out)


def test_what_is_no_adapter_is_an_error_of_one_sentence(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, "info", tmp_path)
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path} is not an adapter directory")


def test_info_names_every_pair_and_the_settings_of_what_was_trained(monkeypatch, capsys, tmp_path):
    pairs = [f"en-{code}" for code in ("de", "fr", "es", "pt", "cs", "ru", "fi", "hu", "vi")]
    model = make_m2m100()
    settings = {"trainable": "low_rank", "r": 3, "default_pair": "base", "task_type": "SEQ_2_SEQ_LM"}
    config = NeuronSpecializationConfig(masks=make_masks(model, pairs=pairs), **settings)
    get_peft_model(model, config).save_pretrained(tmp_path)
    run(monkeypatch, "info", tmp_path)
    out = capsys.readouterr().out
    assert f"9: {', '.join(pairs)}" in out and "low_rank (r=3, default_pair=base)" in out
