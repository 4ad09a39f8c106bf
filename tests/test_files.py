"""Directories: only what this package wrote is replaced, and an interruption loses nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model

import neuron_specialization as ns
from neuron_specialization.export.compaction import save_compact
from neuron_specialization.neurons import files
from neuron_specialization.neurons.files import atomic_directory, check_not_input, complete_writing

from .conftest import PAIRS, make_m2m100, make_masks


def write(directory, names, text="new", overwrite=False):
    with atomic_directory(directory, overwrite) as fresh:
        for name in names:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_text(text)


def content(directory):
    return {
        str(path.relative_to(directory)): path.read_text(errors="replace")
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != files.WRITTEN
    }


@pytest.fixture
def full(tmp_path):
    """A directory with a user's own files, hidden ones and folders among them."""
    for name in ("notes.txt", "data/train.tsv", ".env"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


def test_the_users_files_stay(full):
    before = content(full)
    for text in ("first", "second"):
        write(full, ["a.json", "sub/b.bin"], text)
        assert content(full) == {**before, "a.json": text, "sub/b.bin": text}


def test_a_file_of_the_same_name_is_refused_unless_overwritten(full):
    before = content(full)
    with pytest.raises(
        ValueError, match="already holds notes.txt, which neuron-specialization did not write.*overwrite"
    ):
        write(full, ["a.json", "notes.txt"])
    assert content(full) == before
    write(full, ["a.json", "notes.txt"], overwrite=True)
    assert content(full) == {**before, "a.json": "new", "notes.txt": "new"}
    with pytest.raises(ValueError, match="already holds data"):
        write(full, ["data"], overwrite=True)


def test_weights_that_would_be_read_in_place_of_the_new_ones_are_removed(tmp_path):
    (tmp_path / "model-00001-of-00009.safetensors").write_text("mine")
    write(tmp_path, ["model.safetensors", "config.json"])
    write(tmp_path, ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
    assert set(content(tmp_path)) == {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00001-of-00009.safetensors",
        "model.safetensors.index.json",
    }


def test_translations_of_an_earlier_scoring_are_removed(tmp_path):
    """They would pass for those of the model that results.json describes."""
    write(tmp_path, ["results.json", "translations/en-de.txt", "translations/en-fr.txt"])
    (tmp_path / "translations" / "notes.txt").write_text("mine")
    write(tmp_path, ["results.json", "translations/en-de.txt"])
    assert set(content(tmp_path)) == {"results.json", "translations/en-de.txt", "translations/notes.txt"}


def test_a_readme_of_the_users_is_no_card_of_an_adapter(tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    model = make_m2m100()
    masks = make_masks(model)
    masks.save_pretrained(tmp_path)
    adapted = get_peft_model(model, ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM"))
    for overwrite in (False, True):
        ns.save_adapter(adapted, tmp_path, overwrite=overwrite)
        assert (tmp_path / "README.md").read_text() == "# Mine"
    assert ns.NeuronSpecializationConfig.from_pretrained(tmp_path).trainable == "delta", "the adapter is there"


def test_a_failing_body_leaves_no_trace(tmp_path):
    for target in (tmp_path / "new", tmp_path):
        with pytest.raises(OSError, match="No space"), atomic_directory(target) as fresh:
            (fresh / "a").write_text("half")
            raise OSError("No space left on device")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_writing_is_completed_at_the_next_read_or_write(full, monkeypatch, moved):
    write(full, ["a", "b"], "old")
    before, real = content(full), os.replace

    def fail(*args):
        nonlocal moved
        if not moved:
            raise OSError("Input/output error")
        moved -= 1
        real(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(full, ["a", "b"], "new")
    monkeypatch.undo()
    complete_writing(full)
    assert content(full) == {**before, "a": "new", "b": "new"}
    assert not [path for path in full.iterdir() if path.name.startswith(".neuron")], "no hidden copies"


class Killed(BaseException):
    """Stands for a kill: whatever cleans up after it is killed too."""


def kill_at(step, patch):
    """Kill at a file operation, counted from 0; in the middle of it where it writes."""
    done, write_text = [], Path.write_text

    def killing(operation):
        def run(*args, **kwargs):
            if len(done) == step:
                if operation is write_text:
                    write_text(args[0], args[1][: len(args[1]) // 2])
                raise Killed
            done.append(operation)
            return operation(*args, **kwargs)

        return run

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        patch.setattr(os, name, killing(getattr(os, name)))
    patch.setattr(Path, "write_text", killing(write_text))
    patch.setattr(shutil, "rmtree", killing(shutil.rmtree))


def test_a_kill_at_any_step_leaves_the_old_files_or_the_new_ones(tmp_path, monkeypatch):
    old, new = ["a", "model.bin"], ["a", "b", "model.safetensors"]
    step, killed = 0, True
    while killed:
        target = tmp_path / str(step)
        write(target, old, "old")
        (target / "mine").write_text("mine")
        killed = False
        with monkeypatch.context() as patch:
            kill_at(step, patch)
            try:
                with atomic_directory(target) as fresh:
                    for name in new:
                        (fresh / name).write_bytes(b"new")
            except Killed:
                killed = True
        complete_writing(target)
        found = {name: text for name, text in content(target).items() if not name.startswith(".neuron")}
        assert found.pop("mine") == "mine"
        assert found in ({"a": "old", "model.bin": "old"}, dict.fromkeys(new, "new")), f"after step {step}"
        write(target, new, "later")  # they are known to be ours
        assert content(target) == {**dict.fromkeys(new, "later"), "mine": "mine"}, f"after step {step}"
        step += 1
    assert step > 10


def test_what_a_killed_process_left_half_written_is_discarded(tmp_path):
    write(tmp_path, ["a"], "old")
    left = files.begin_writing(tmp_path)
    (left / "a").write_text("half")
    complete_writing(tmp_path)
    assert (tmp_path / "a").read_text() == "old"
    write(tmp_path, ["a"], "new")
    assert sorted(os.listdir(tmp_path)) == [files.WRITTEN, "a"]


def test_a_list_of_files_cannot_lead_out_of_its_directory(tmp_path):
    target, outside = tmp_path / "target", tmp_path / "model.safetensors"
    write(target, ["a"])
    outside.write_text("mine")
    (target / files.WRITTEN).write_text(f'["../model.safetensors", "{outside}", 3]')
    write(target, ["model.bin"])
    assert outside.exists()
    (target / files.WRITTEN).write_text("damaged")
    with pytest.raises(ValueError, match="already holds model.bin"):
        write(target, ["model.bin"])


def test_inputs_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is an input"):
        check_not_input(".", None, "some/hub-id", tmp_path)
    check_not_input("elsewhere", tmp_path)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    check_not_input("run", "run/adapter")
    with pytest.raises(ValueError, match="run/adapter is an input"):
        check_not_input("run", "run/adapter", contents=True)


def test_everything_that_is_saved_leaves_the_users_files(full, monkeypatch):
    monkeypatch.chdir(full)
    model, before = make_m2m100(), content(full)
    masks = make_masks(model)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="none", task_type="SEQ_2_SEQ_LM")
    masks.save_pretrained(".")
    written = {"README.md", "adapter_config.json", "adapter_model.safetensors", "kept_neurons.svg"}
    assert set(content(full)) == {*before, *written}
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained("peft")
    (full / "peft" / "README.md").write_text("---\nlibrary_name: peft\n---\nMy own card")
    for _ in range(2):
        ns.save_adapter(adapted, ".")
        ns.save_adapter(adapted, "peft", safe_serialization=False)  # in the place of what PEFT saved
    assert not (full / "peft" / "adapter_model.safetensors").exists()
    assert "My own card" in (full / "peft" / "README.md").read_text()
    (full / "checkpoint").mkdir()
    (full / "checkpoint" / "notes.txt").write_text("mine")
    save_compact(ns.compact(adapted, "en-de"), "checkpoint")
    assert (full / "checkpoint" / "notes.txt").read_text() == "mine"
    assert before.items() <= content(full).items()
    loaded = ns.NeuronMasks.from_pretrained(".")
    assert loaded.language_pairs == PAIRS and loaded.rows.keys() == masks.rows.keys()


def test_another_methods_adapter_is_not_replaced(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="already holds adapter_config.json"):
        make_masks(make_m2m100()).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["adapter_config.json"]


@pytest.mark.parametrize("first", [False, True], ids=["over another", "first"])
def test_an_adapter_whose_saving_was_interrupted_is_completed_by_who_loads_it(tmp_path, monkeypatch, first):
    model = make_m2m100()
    old, new = make_masks(model, seed=0), make_masks(model, seed=5)
    real = os.replace

    def fail(source, target):
        if target.parent == tmp_path and (first or target.suffix == ".safetensors"):  # moved into place
            raise OSError("Input/output error")
        real(source, target)

    def loaded(load):
        load(str(tmp_path))
        return ns.NeuronMasks.from_pretrained(tmp_path)

    for load in (
        lambda: ns.NeuronMasks.from_pretrained(tmp_path),
        lambda: ns.NeuronSpecializationConfig(masks=tmp_path).masks,
        lambda: loaded(lambda path: PeftModel.from_pretrained(make_m2m100(), path)),
        lambda: loaded(lambda path: make_m2m100().load_adapter(path)),
    ):
        if first:
            files.remove_written(tmp_path)
        else:
            old.save_pretrained(tmp_path)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(os, "replace", fail)
            new.save_pretrained(tmp_path)
        assert all(load().rows[name].equal(rows) for name, rows in new.rows.items())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    with files.replacing(path) as partial:
        partial.write_text("before")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as partial:
        partial.write_text("half of wh")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_two_processes_that_write_one_file_do_not_break_each_other(tmp_path):
    path = tmp_path / "file.json"
    other = (
        "import sys\n"
        "from neuron_specialization.neurons.files import replacing\n"
        "with replacing(sys.argv[1]) as partial:\n"
        "    partial.write_text('of the other')"
    )
    with files.replacing(path) as partial:
        partial.write_text("of this one")
        subprocess.run([sys.executable, "-c", other, str(path)], check=True)
        assert path.read_text() == "of the other"
    assert path.read_text() == "of this one" and os.listdir(tmp_path) == ["file.json"]
