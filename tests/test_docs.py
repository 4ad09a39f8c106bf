"""What the documentation points at exists: names in docstrings, linked files, the version in the changelog."""

import ast
import importlib
import pkgutil
import re
from functools import reduce
from pathlib import Path

import pytest

import neuron_specialization as ns
from neuron_specialization.baselines.methods import METHODS

ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(ns.__path__, ns.__name__ + ".")]
PAGES = [
    path for path in ROOT.rglob("*.md") if not {".venv", "build", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
]
DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(.*?\))?`")
CAMEL_CASE = re.compile(r"`([A-Z][a-z]+[A-Z]\w*)(?:\(.*?\))?`")
FILE = re.compile(r"\.(csv|json|jsonl|tsv|yaml|safetensors|parquet|py|md|txt)$")
LIBRARIES = ("transformers", "peft", "accelerate", "torch.nn", "builtins")
INSTANCES = ("model", "tokenizer", "self", "config", "trainer", "args")  # their attributes are not looked up


def attribute(owner, name):
    fields = getattr(owner, "__dataclass_fields__", {})
    return fields[name] if name in fields else getattr(owner, name)


def resolves(name: str, module) -> bool:
    """Whether a name in a docstring of `module` exists there, in its package, in ours, or in a library."""
    parts = name.removeprefix("ns.").split(".")
    package = importlib.import_module(module.__package__)
    for owner in (module, package, ns, *map(importlib.import_module, LIBRARIES if len(parts) == 1 else ())):
        try:
            reduce(attribute, parts, owner)
            return True
        except AttributeError:
            continue
    for full in (name, f"{module.__package__}.{name}", f"{ns.__name__}.{name}"):  # modules not imported yet
        try:
            pkgutil.resolve_name(full)
            return True
        except (ImportError, AttributeError):
            continue
    return False


def references(source: str) -> set[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    text = "\n".join(ast.get_docstring(n) or "" for n in ast.walk(ast.parse(source)) if isinstance(n, documented))
    found = {*DOTTED.findall(text), *CAMEL_CASE.findall(text)}
    return {name for name in found if not FILE.search(name) and name.split(".")[0] not in INSTANCES}


@pytest.mark.parametrize("name", MODULES)
def test_names_in_docstrings_exist(name):
    module = importlib.import_module(name)
    source = Path(module.__file__ or "").read_text()
    assert {reference for reference in references(source) if not resolves(reference, module)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_changelog_begins_with_this_version():
    releases = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == ns.__version__


def test_the_readmes_public_names_exist():
    names = set(re.findall(r"\bns\.(\w+)", (ROOT / "README.md").read_text()))
    assert names and {name for name in names if not hasattr(ns, name)} == set()


def test_the_guide_tells_of_every_method_of_a_comparison():
    guide = (ROOT / "recipes" / "README.md").read_text()
    assert not [method for method in METHODS if f"`{method}`" not in guide]


def test_imports_run_the_way_that_the_table_of_folders_says():
    """The circle that a shortcut between two folders closes is found late otherwise."""
    guide = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(?:src/neuron_specialization|\.\.\.)/(\w+)` \| .* \| (.*) \|$", guide, re.M)
    allowed = {folder: set(re.findall(r"`(\w+)`", names)) for folder, names in rows}
    package = ROOT / "src" / "neuron_specialization"
    assert len(allowed) == 6
    for folder, others in allowed.items():
        for path in (package / folder).rglob("*.py"):
            found = set(re.findall(r"from \.\.+(" + "|".join(allowed) + r")\b", path.read_text()))
            assert found <= others | {folder}, path
