"""What mypy tells users of the package."""

import subprocess
import sys

USER = """
import neuron_specialization as ns

counts: ns.ActivationCounts = ns.record_corpus(object(), object(), {})
masks: ns.NeuronMasks = ns.CumulativeThreshold(k=0.95).select(counts)
translated: list[str] = ns.translate(object(), object(), (text for text in ["a"]), "en-de")
wrong: int = ns.translate(object(), object(), ["a"], "en-de")
"""
# of the installed packages only ours is read: the others take a minute
CONFIG = "[mypy]\nfollow_imports = skip\n[mypy-neuron_specialization.*]\nfollow_imports = silent\n"


def test_users_get_types(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    (error, summary) = done.stdout.splitlines()
    assert error.startswith("user.py:7: error: Incompatible types in assignment"), done.stdout
