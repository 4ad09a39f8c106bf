"""What the comparison compares: each method's model, its loss, and its stages."""

import copy
import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file

import neuron_specialization as ns
from neuron_specialization.baselines.bottleneck import bottleneck_adapters
from neuron_specialization.baselines.collected import collect
from neuron_specialization.baselines.ffn_copies import ffn_copies
from neuron_specialization.baselines.folders import alone, identification_folder
from neuron_specialization.baselines.methods import (
    EQUAL_SECONDS,
    IDENTIFIED_BY,
    LASS,
    METHODS,
    PER_DIRECTION,
    MethodArguments,
    build_model,
    check_methods,
    knob_grids,
    masks_of,
    parse_method,
    planned_stages,
    seeds_of,
)
from neuron_specialization.baselines.settings import StageArguments, check_settings
from neuron_specialization.baselines.stages import PART, SETTINGS, Comparison
from neuron_specialization.baselines.trials import depends_on
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.results import write_results
from neuron_specialization.translation.token_loss import token_losses
from neuron_specialization.translation.training import fit

from .conftest import PAIRS, make_batch, make_m2m100, make_t5
from .test_training import arguments, weights

TOY_PAIRS = ["Pv-Aa", "Pv-Ba", "Aa-Pv", "Ba-Pv"]


@pytest.fixture
def counts(toy_model, toy_tokenizer, toy_data):
    return ns.record_corpus(toy_model, toy_tokenizer, toy_data["validation"])


def make_comparison(model, tokenizer, toy_data, directory, **budget):
    data = {split: {pair: rows.select(range(16)) for pair, rows in of.items()} for split, of in toy_data.items()}
    small = {"single_updates": 2, "bilingual_updates": 3, "evaluations": 2, "num_beams": 1, "tuning_directions": 1}
    stage = StageArguments(**{**small, **budget})
    method = MethodArguments(k=0.5, exchange=["Aa=Ba", "Ba=Aa"])
    training = arguments(directory, max_steps=3, per_device_eval_batch_size=16)
    return Comparison(model, tokenizer, data, stage, method, training, pivot="Pv", max_length=64)


@pytest.fixture
def comparison(toy_model, toy_tokenizer, toy_data, tmp_path):
    return make_comparison(toy_model, toy_tokenizer, toy_data, tmp_path)


@pytest.mark.usefixtures("each_batch_size")
def test_k_1_equals_fine_tuning_update_by_update(toy_model, toy_tokenizer, toy_data, tmp_path):
    """The masks keep all; training under them, with dropout and Adam, is bit for bit that of the dense model."""
    data = {pair: rows.select(range(16)) for pair, rows in toy_data["train"].items()}
    counts = ns.record_corpus(toy_model, toy_tokenizer, toy_data["train"])
    masks = ns.CumulativeThreshold(1.0).select(counts)
    assert all(rows.all() for rows in masks.rows.values()), "every neuron was active for every pair"
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="full", task_type="SEQ_2_SEQ_LM")
    dense, masked = copy.deepcopy(toy_model), get_peft_model(copy.deepcopy(toy_model), config)
    for model in (dense, masked):
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.1
        args = arguments(tmp_path / type(model).__name__, max_steps=4, gradient_accumulation_steps=2)
        fit(model, toy_tokenizer, data, None, args)
    trained = weights(masked.get_base_model())
    for name, weight in weights(dense).items():
        other = trained[name if name in trained else name.replace("fc1.", "fc1.base_layer.")]
        assert other.equal(weight), name
    assert not dense.model.shared.weight.equal(toy_model.model.shared.weight)


@pytest.mark.parametrize("per_target", [False, True], ids=["per pair", "per target"])
@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["relu", "gated"])
def test_ffn_copies_start_at_the_model_and_part_in_training(make, per_target):
    model = make()
    owners = list(dict.fromkeys(pair.split("-")[1] if per_target else pair for pair in PAIRS))
    before = copy.deepcopy(model)
    widths = {block.name: block.d_ff for block in ns.find_ffn_blocks(model)}
    copies = ffn_copies(model, PAIRS, per_target=per_target)
    batch = make_batch()
    for pair in PAIRS:
        with torch.no_grad():
            torch.testing.assert_close(copies(**batch, language_pairs=[pair]).logits, before(**batch).logits)
    copies.train()
    optimizer = torch.optim.SGD(copies.parameters(), lr=0.1)
    copies(**batch, language_pairs=["de-en"]).loss.backward()
    optimizer.step()
    before_ups = {block.name: block.gate or block.up for block in ns.find_ffn_blocks(before)}
    for block in ns.find_ffn_blocks(copies):
        name = block.name.removeprefix("base_model.model.")
        width = widths[name]
        assert block.d_ff == len(owners) * before_ups[name].weight.shape[0]
        own = block.down.weight.unflatten(1, (len(owners), width))
        start = next(b for b in ns.find_ffn_blocks(before) if b.name == name).down.weight
        moved = [owner for i, owner in enumerate(owners) if not own[:, i].equal(start)]
        assert moved == ["en" if per_target else "de-en"], "only the copy of the pair in the batch trains"
    copies.eval()
    with torch.no_grad():
        one, other = (copies(**batch, language_pairs=[pair]).logits for pair in ("de-en", "en-de"))
    assert not one.allclose(other)


def test_token_losses_leave_the_language_tag_out(toy_model, toy_tokenizer, toy_data, counts):
    """The tag's own loss is the model's uncertainty about the direction, which generation is told."""
    rows = {pair: toy_data["test"][pair].select(range(5)) for pair in ("Pv-Aa", "Ba-Pv")}
    masks = ns.CumulativeThreshold(0.3).select(counts)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="none", task_type="SEQ_2_SEQ_LM")
    adapted = get_peft_model(copy.deepcopy(toy_model), config)
    models = {"d": toy_model, "m": adapted}
    losses = {name: token_losses(model, toy_tokenizer, rows, batch_size=2) for name, model in models.items()}
    toy_model.eval()
    adapted.eval()
    for pair, data in rows.items():
        toy_tokenizer.src_lang, toy_tokenizer.tgt_lang = pair.split("-")
        nats, count = {"d": 0.0, "m": 0.0}, 0
        for row in data:
            inputs = toy_tokenizer(row["source"], text_target=row["target"], return_tensors="pt")
            labels = inputs["labels"][0]
            assert labels[0] == toy_tokenizer.convert_tokens_to_ids(pair.split("-")[1])
            with torch.no_grad():
                outputs = {"d": toy_model(**inputs), "m": adapted(**inputs, language_pairs=[pair])}
            for name, output in outputs.items():
                nll = -output.logits[0].log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
                nats[name] += nll[1:].sum().item()
            count += len(labels) - 1
        for name, of in losses.items():
            assert of[pair] == pytest.approx(nats[name] / count, rel=1e-4)
    assert losses["d"]["Pv-Aa"] != pytest.approx(losses["m"]["Pv-Aa"], rel=1e-4), "the second ran under its masks"


KINDS = ("baseline", "bilingual", "ffn_copies", "ours", "delta", "masks_only", "taylor", "lora")


@pytest.mark.parametrize("method", KINDS)
def test_every_kind_of_method_runs_as_a_stage(method, comparison):
    assert comparison.run(method, 0), (comparison.directory / method / "seed-0" / "failed.json").read_text()
    found = collect(comparison.directory)
    assert sorted(row["direction"] for row in found["rows"]) == sorted(TOY_PAIRS)
    (stage,) = found["stages"]
    assert stage["status"] == "done" and stage["parts"] == (4 if method in PER_DIRECTION else 1)
    expected = {"bilingual": 12, "fine_tune_single": 8, "baseline": 0, "masks_only": 0}.get(method, 3)
    assert stage["updates"] == expected
    assert (stage["identification_seconds"] > 0) == (method in IDENTIFIED_BY)
    masked = stage["kept"] is not None
    assert masked == (method in IDENTIFIED_BY) and (not masked or 0 < stage["kept"] < 1)
    assert (stage["extra_parameters"] > 0) == (method in ("ffn_copies", "delta", "lora", "bilingual"))
    if method == "bilingual":
        own = sum(parameter.numel() for parameter in comparison.baseline.parameters())
        assert stage["extra_parameters"] == 3 * own, "four models in the place of one"
    if masked and method != "masks_only":
        tensors = load_file(next(comparison.directory.rglob("adapter_model.safetensors")))
        masks = [tensor for key, tensor in tensors.items() if key.endswith("neuron_specialization_mask")]
        assert stage["mask_bytes"] == sum(packed.numel() for packed in masks) > 0
    rows = {row["direction"]: row for row in found["rows"]}
    assert all(row["loss"] > 0 and 0 <= row["chrf++"] <= 100 for row in rows.values())
    assert not list(comparison.directory.rglob("checkpoint-*")), "no optimizer states are left"
    if method == "lora":
        card = (comparison.directory / "lora" / "seed-0" / "model" / "README.md").read_text()
        assert "# LoRA for" in card and "More Information Needed" not in card and "| updates | 3 |" in card
        assert all(f"{row['chrf++']:.2f} |" in card for row in rows.values())
    if method not in ("baseline", "masks_only"):
        assert list(comparison.directory.rglob("*.safetensors")), "the final model is kept"


def test_masks_differ_between_methods_as_they_should(counts):
    args = MethodArguments(k=0.5, exchange=["Aa=Ba", "Ba=Aa"])
    selected = [name for name, measure in IDENTIFIED_BY.items() if measure == "activity"]
    masks = {name: masks_of(name, counts, args, "Pv", 0) for name in selected}
    ours = masks["ours"]
    decoder = [name for name, stack in ours.stacks.items() if stack == "decoder"]
    for pair in TOY_PAIRS:
        sizes = {name: {b: int(m.row(pair, b).sum()) for b in ours.rows} for name, m in masks.items()}
        assert sizes["random"] == sizes["random_overlap"] == sizes["ours"]
        for name in ours.rows:
            alone, other = ("ours_dec", "ours_enc") if name in decoder else ("ours_enc", "ours_dec")
            assert masks[alone].row(pair, name).equal(ours.row(pair, name)) and masks[other].row(pair, name).all()
    for method in ("random", "random_overlap"):
        drawn = masks[method], masks_of(method, counts, args, "Pv", 1)
        assert all(any(not rows.equal(ours.rows[name]) for name, rows in each.rows.items()) for each in drawn)
        assert any(not rows.equal(drawn[1].rows[name]) for name, rows in drawn[0].rows.items()), "another draw"
    assert all(masks["union"].iou("Pv-Aa", "Ba-Pv")[name] == 1 for name in ours.rows)
    assert all(masks["wrong_pair"].row("Pv-Aa", name).equal(ours.row("Pv-Ba", name)) for name in ours.rows)
    with pytest.raises(ValueError, match="needs a pivot"):
        masks_of("group", counts, args, None, 0)
    with pytest.raises(ValueError, match="'lass' has no masks of neurons"):
        masks_of("lass", counts, args, None, 0)
    with pytest.raises(ValueError, match="taylor is identified by attribution, but got activity"):
        masks_of("taylor", counts, args, None, 0)


def test_a_stage_that_is_done_is_skipped_and_a_failed_one_is_reported_and_tried_again(comparison):
    assert comparison.run("ours", 1)
    part = comparison.directory / "ours" / "seed-1" / "part.json"
    written = part.stat().st_mtime_ns
    assert comparison.run("ours", 1) and part.stat().st_mtime_ns == written
    comparison.pivot = None
    assert not comparison.run("group", 0)
    stages = {stage["method"]: stage for stage in collect(comparison.directory)["stages"]}
    assert stages["group"]["status"] == "failed" and "needs a pivot" in stages["group"]["error"]
    losses = stages["ours"]["validation_losses"]
    assert losses[-1][0] == stages["ours"]["updates"] and all(loss > 0 for _, loss in losses)
    comparison.pivot = "Pv"
    assert comparison.run("group", 0)
    assert {stage["status"] for stage in collect(comparison.directory)["stages"]} == {"done"}
    assert comparison.run("fine_tune_single", 0)
    (comparison.directory / "fine_tune_single" / "seed-0" / "Pv-Ba" / "part.json").unlink()
    stages = collect(comparison.directory, [("ours", 1), ("lass", 0)])["stages"]
    statuses = {(stage["method"], stage["status"]) for stage in stages}
    assert statuses >= {("ours", "done"), ("fine_tune_single", "3 of 4 parts"), ("lass", "not begun")}
    assert len(stages) == 4, "every stage once"


def test_a_stage_that_another_process_runs_is_left_for_later(comparison):
    done = [comparison.stage_directory(method, 0) / PART for method in ("baseline", "masks_only")]
    with ThreadPoolExecutor() as pool:
        with alone(comparison.directory, "baseline-seed-0"):
            running = pool.submit(comparison.run_all, [("baseline", 0), ("masks_only", 0)])
            started = time.monotonic()
            while not done[1].is_file() and time.monotonic() < started + 60:
                time.sleep(0.1)
            assert done[1].is_file() and not done[0].parent.exists()
        assert running.result(timeout=60) == [] and done[0].is_file()


def test_what_is_timed_comes_after_what_another_process_runs(comparison):
    order = []
    comparison.run = lambda method, seed: order.append(method) or True
    with alone(comparison.directory, "ours-seed-0"):
        comparison.run_all([("ours", 0), ("fine_tune_equal_seconds", 0)])
    assert order == ["ours", "fine_tune_equal_seconds"]


def test_the_settings_of_a_method_that_only_failed_may_be_corrected(comparison):
    comparison.method.families = ["Pv=P", "Aa=A"]
    comparison.training.max_steps = 1
    assert not comparison.run("adapter_fam", 0)
    comparison.method.families = [*comparison.method.families, "Ba=A"]
    assert comparison.run("adapter_fam", 0)
    comparison.method.families = ["Pv=P", "Aa=P", "Ba=A"]
    with pytest.raises(ValueError, match=r"other settings \(families of adapter_fam\)"):
        comparison.run("adapter_fam", 0)


def test_controls_share_the_knob_that_the_trials_of_their_method_choose(comparison):
    """With another alpha they would differ from it in sparsity, too."""
    comparison.stage.knobs = ["lass_alpha=[0.3, 0.7]"]
    for alpha, loss in ((0.3, 2.0), (0.7, 1.0)):
        trial = comparison.directory / "lass" / f"trial-{comparison.stage.learning_rates[0]:g}-alpha={alpha:g}"
        write_results(trial, {"validation_loss": {"Pv-Aa": loss}}, "trial.json")
    assert {comparison.setting(method).knobs.alpha for method in LASS} == {0.7}
    assert comparison.setting("ours").knobs.alpha == comparison.method.alpha
    assert "grid of lass" in {name for name in depends_on("lass_shared", comparison.method, comparison.stage)}


def test_stages_of_other_settings_are_not_mixed(comparison):
    again = {field.name: getattr(comparison, field.name) for field in dataclasses.fields(comparison)}
    Comparison(**again)
    assert comparison.run("masks_only", 0)
    with pytest.raises(ValueError, match=r"other settings \(k of masks_only\)"):
        changed(comparison, {"k": 0.7}, methods=["masks_only=1"])
    other = copy.deepcopy(comparison.baseline)
    other.model.shared.weight.data[5] += 1
    with pytest.raises(ValueError, match=r"other settings \(baseline\)"):
        Comparison(**{**again, "baseline": other})
    same_weights = copy.deepcopy(comparison.baseline)
    same_weights.config.dropout = 0.5
    with pytest.raises(ValueError, match=r"other settings \(configuration\)"):
        Comparison(**{**again, "baseline": same_weights})
    corrected = {
        pair: rows.map(lambda row: {"target": row["target"] + " ba"}) for pair, rows in again["data"]["test"].items()
    }
    with pytest.raises(ValueError, match=r"other settings \(text\)"):
        Comparison(**{**again, "data": {**again["data"], "test": corrected}})
    written = (comparison.directory / SETTINGS).stat().st_mtime_ns
    Comparison(**again)
    assert (comparison.directory / SETTINGS).stat().st_mtime_ns == written, "a directory that is read stays as it is"


def test_neurons_are_identified_on_text_as_long_as_that_trained_on(comparison):
    short = copy.copy(comparison)
    short.max_length, short.directory = 4, comparison.directory / "short"
    positions = {name: of.counts().tokens["encoder"] for name, of in (("whole", comparison), ("short", short))}
    assert (positions["short"] <= 4 * 16).all() and (positions["whole"] > 4 * 16).all()


def test_what_cannot_be_scored_is_refused_before_any_training(comparison, monkeypatch):
    again = {field.name: getattr(comparison, field.name) for field in dataclasses.fields(comparison)}
    long = {"Pv-Aa": Dataset.from_dict({"source": ["babu " * 99], "target": ["ba"]})}
    with pytest.raises(ValueError, match="^Sentence 1 of Pv-Aa, .* positions for 64"):
        Comparison(**{**again, "data": {**comparison.data, "test": long}})
    with pytest.raises(ValueError, match="^Sentence 1 of Pv-Aa, .* positions for 64"):
        Comparison(**{**again, "data": {**comparison.data, "validation": long}})
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(ImportError, match=r"neuron-specialization\[ja\]"):
        Comparison(**{**again, "data": {split: {"Pv-ja": of["Pv-Aa"]} for split, of in comparison.data.items()}})


def changed(comparison, method=None, **stage):
    """Return the comparison as another call would make it: its settings of methods or of stages may be other ones."""
    again = {field.name: getattr(comparison, field.name) for field in dataclasses.fields(comparison)}
    again["method"] = dataclasses.replace(comparison.method, **(method or {}))
    return Comparison(**{**again, "stage": dataclasses.replace(comparison.stage, **stage)})


def test_a_comparison_is_extended_by_methods_of_other_settings(comparison):
    """The settings of one method say nothing of another's stages: these stand, and the new ones are run."""
    assert comparison.run("fine_tune", 0)
    with pytest.raises(ValueError, match="Pv-Aa would have the masks of Aa-Ba, which is not among the pairs"):
        changed(comparison, {"exchange": ["Pv=Aa", "Aa=Ba", "Ba=Pv"]}, methods=["wrong_pair=1"])
    later = changed(comparison, learning_rates=[1e-2], methods=["wrong_pair=1"])
    assert later.run("wrong_pair", 0)
    changed(comparison, methods=["fine_tune=2"])
    for listed, rates in (("fine_tune", [1e-2]), ("wrong_pair", comparison.stage.learning_rates)):
        with pytest.raises(ValueError, match=rf"other settings \(learning_rates of {listed}\)"):
            changed(comparison, learning_rates=rates, methods=[f"{listed}=2"])
    rates = {stage["method"]: stage["learning_rate"] for stage in collect(comparison.directory)["stages"]}
    assert rates == {"fine_tune": comparison.stage.learning_rates[0], "wrong_pair": 1e-2}


def test_what_is_chosen_by_the_trials_of_another_method_is_not_mixed(comparison):
    assert comparison.run("fine_tune", 0) and comparison.run("fine_tune_single", 0) and comparison.run("masks_only", 0)
    for method in ("fine_tune_equal_seconds", "lass"):
        with pytest.raises(ValueError, match="learning_rates of fine_tune"):
            changed(comparison, learning_rates=[1e-2]).run(method, 0)
    for method in ("masks_only", "ours", "group"):  # whose masks are made from those of ours
        with pytest.raises(ValueError, match="grid of ours"):
            changed(comparison, knobs=["ours_k=[0.3, 0.9]"]).run(method, 0)


@pytest.mark.parametrize(
    "change",
    [{"lr_scheduler_kwargs": {"num_decay_steps": 9}}, {"neftune_noise_alpha": 5.0}, {"optim_args": "x=1"}],
    ids=lambda change: next(iter(change)),
)
def test_stages_trained_by_other_settings_of_the_trainer_are_not_mixed(comparison, change):
    """Whatever decides what a run learns, but what each stage sets itself."""
    again = {field.name: getattr(comparison, field.name) for field in dataclasses.fields(comparison)}
    free = dataclasses.replace(comparison.training, learning_rate=1e-2, logging_steps=7, seed=3)
    Comparison(**{**again, "training": free})
    with pytest.raises(ValueError, match=rf"other settings \({next(iter(change))}\)"):
        Comparison(**{**again, "training": dataclasses.replace(comparison.training, **change)})


def test_a_method_is_listed_once():
    with pytest.raises(ValueError, match="listed once, .* twice are ours"):
        seeds_of(["ours=3", "fine_tune=1", "ours=1"])


def test_fine_tuning_for_equal_seconds_goes_on_with_the_updates_it_began_with(comparison):
    """More seeds may have been timed meanwhile, by another process."""
    assert comparison.run("fine_tune", 0) and comparison.run("ours", 0)
    assert comparison.run("fine_tune_equal_seconds", 0)
    part = comparison.stage_directory("fine_tune_equal_seconds", 0) / PART
    updates = json.loads(part.read_text())["rows"][0]["updates"]
    part.unlink()  # interrupted while it was scored
    timed = comparison.stage_directory("ours", 0) / PART
    slower = json.loads(timed.read_text())
    timed.write_text(json.dumps({**slower, "rows": [{**row, "seconds": 1e3} for row in slower["rows"]]}))
    assert comparison.run("fine_tune_equal_seconds", 0)
    assert json.loads(part.read_text())["rows"][0]["updates"] == updates


def test_stages_of_earlier_versions_keep_their_settings(comparison):
    """These recorded settings once for all methods, and not those that did not exist yet."""
    assert comparison.run("general_specific", 0) and comparison.run("ours_k=0.9", 0)
    path = comparison.directory / SETTINGS
    written = json.loads(path.read_text())["settings"]
    once = {name: value for name, value in written.items() if " of " not in name}
    once |= {"k": 0.5, "learning_rates": comparison.stage.learning_rates, "rho": 0.7, "exchange": [], "knobs": []}
    listed = ["general_specific=2", "ours_k=0.9=2"]
    path.write_text(json.dumps({"settings": once}))
    assert changed(comparison, methods=listed).run("wrong_pair", 0), "a method that had not begun"
    for setting, value in {"rho": 0.6, "kappa": 0.5}.items():  # kappa was not recorded: it was the default
        path.write_text(json.dumps({"settings": once}))
        with pytest.raises(ValueError, match=rf"other settings \({setting} of general_specific\)"):
            changed(comparison, {setting: value}, methods=listed)
    path.write_text(json.dumps({"settings": once}))
    with pytest.raises(ValueError, match="other settings .*learning_rates of ours_k=0.9"):
        changed(comparison, learning_rates=[1e-2], methods=listed)


def test_fine_tuning_for_equal_seconds_comes_after_every_seed_that_it_is_timed_by():
    planned = planned_stages(["fine_tune_equal_seconds=1", "fine_tune=2", "ours=1"])
    assert planned == [("fine_tune", 0), ("ours", 0), ("fine_tune", 1), ("fine_tune_equal_seconds", 0)]


def test_a_stage_names_the_value_of_a_knob(comparison, counts):
    args = comparison.method
    assert parse_method("ours", args) == ("ours", args)
    assert parse_method("ours_enc_k=.7", args) == ("ours_enc", dataclasses.replace(args, k=0.7))
    assert parse_method("adapter_lp_adapter_width=8", args)[1].adapter_width == 8
    for wrong in ("k=0.5", "ours_q=0.5", "ours_k=half", "lora_r=2.5", "fine_tune_equal_seconds_lass_alpha=0.3"):
        with pytest.raises(ValueError, match="such as ours_k=0.9"):
            parse_method(wrong, args)
    for wrong in ("-0.1", "1", "nan"):
        with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
            parse_method(f"bilingual_dropout={wrong}", args)
        with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
            MethodArguments(dropout=float(wrong))
        with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
            knob_grids([f"bilingual_dropout=[0, {wrong}]"])
    for knob, value in {"k": 95, "rho": 7, "kappa": 0, "alpha": 1, "r": -1, "adapter_width": 0}.items():
        with pytest.raises(ValueError, match=f"^{knob} (must be|is a number of) .*, got {value}"):
            MethodArguments(**{knob: value})
    for stages, message in (
        (["our"], "no method 'our'"),
        (["wrong_pair"], "permutation"),
        (["lass_wrong_pair"], "permutation"),
        (["adapter_fam"], "families"),
        (["group"], "pivot"),
        (["ours_q=1"], "such as ours_k"),
    ):
        with pytest.raises(ValueError, match=message):
            check_methods(["ours", *stages], MethodArguments(), None)
    assert seeds_of(["ours=3", "ours_k=0.9=1"]) == {"ours": 3, "ours_k=0.9": 1}
    with pytest.raises(ValueError, match=r"got ours_k=0\.9\.$"):
        seeds_of(["ours=3", "ours_k=0.9"])
    kept = {}
    for stage in ("masks_only", "masks_only_k=0.9"):
        assert comparison.run(stage, 0)
        knobs = parse_method(stage, args)[1]
        masks = masks_of("masks_only", counts, knobs, "Pv", 0)
        kept[stage] = sum(int(masks.row("Pv-Aa", block).sum()) for block in masks.rows)
    assert kept["masks_only"] < kept["masks_only_k=0.9"]
    losses = {row["method"]: row["loss"] for row in collect(comparison.directory)["rows"]}
    assert len(losses) == 2 and len(set(losses.values())) == 2, "a stage of its own, under masks of its own"


@pytest.mark.parametrize("method, timed", EQUAL_SECONDS.items())
def test_fine_tuning_for_as_many_seconds_as_another_method(comparison, method, timed):
    assert not comparison.run(method, 0)
    assert "run both with the same seed first" in collect(comparison.directory)["stages"][0]["error"]
    seconds = {timed: (32.0, 26.0, 1.0), "fine_tune": (8.0, 12.0)}
    for name, spent in seconds.items():
        for seed, each in enumerate(spent):
            rows = [{"updates": 3, "seconds": each}]
            write_results(comparison.directory / name / f"seed-{seed}", {"rows": rows}, PART)
    comparison.counts()
    write_results(identification_folder(comparison.directory, IDENTIFIED_BY[timed]), {"seconds": 1.0})
    assert comparison.run(method, 0)
    row = json.loads((comparison.directory / method / "seed-0" / PART).read_text())["rows"][0]
    assert row["updates"] == 3 * (29 + 1) / 10, "means over the seeds that both have"


def test_the_warm_up_is_as_large_a_share_of_every_run(comparison):
    comparison.training.max_steps, comparison.training.warmup_steps = 4, 2
    comparison.stage.single_updates, comparison.stage.bilingual_updates = 2, 8
    warm_up = {"fine_tune": 2, "fine_tune_single": 1, "bilingual": 4}
    for method, steps in warm_up.items():
        assert comparison.run(method, 0)
        run = next(comparison.stage_directory(method, 0).rglob("run.json"))
        assert json.loads(run.read_text())["depends_on"]["warmup_steps"] == steps


def test_a_setting_that_json_has_no_word_for_is_the_same_again(tmp_path):
    for _ in range(2):
        check_settings(tmp_path, "comparison.json", {"max_grad_norm": float("inf")})


def test_a_rate_at_which_training_diverges_is_not_chosen(comparison):
    comparison.training.max_grad_norm = 0.0
    comparison.stage.learning_rates = [1e30, 1e-3]
    assert comparison.setting("fine_tune").learning_rate == 1e-3
    tried = comparison.directory / "fine_tune" / "trial-1e+30" / "trial.json"
    assert set(json.loads(tried.read_text())["validation_loss"].values()) == {None}
    found = collect(comparison.directory)
    assert [trial["validation_loss"] is None for trial in found["trials"]] == [False, True]


def test_a_diverged_run_is_a_failure(comparison):
    comparison.training.max_grad_norm = 0.0
    comparison.stage.learning_rates = [1e30]
    assert not comparison.run("fine_tune", 0)
    assert "diverged" in collect(comparison.directory)["stages"][0]["error"]
    failure = json.loads((comparison.stage_directory("fine_tune", 0) / "failed.json").read_text())
    assert "in _part" in failure["traceback"]


def test_the_learning_rate_is_the_best_of_trials_that_never_saw_the_test_set(comparison):
    comparison.stage.learning_rates = [1e-6, 1e-2]
    comparison.training.max_steps = 12
    comparison.data["test"].clear()
    assert comparison.setting("fine_tune").learning_rate == 1e-2
    trials = collect(comparison.directory)["trials"]
    assert {(trial["learning_rate"], trial["updates"]) for trial in trials} == {(1e-2, 4), (1e-6, 4)}
    comparison.stage.scratch_learning_rates = [1e-3]
    assert comparison.setting("bilingual").learning_rate == 1e-3, "one rate needs no trial"
    assert comparison.setting("masks_only").learning_rate is None
    assert len(collect(comparison.directory)["trials"]) == 2


@pytest.mark.parametrize("method", ["ours", "fine_tune_single"])
def test_a_trial_of_all_updates_is_the_stage_that_it_chooses(comparison, method):
    comparison.stage.trial_share, comparison.stage.learning_rates = 1, [1e-6, 1e-2]
    comparison.stage.tuning_directions = len(TOY_PAIRS)
    rate = comparison.setting(method).learning_rate
    folder = comparison.directory / method
    parts = [pairs[0] if method == "fine_tune_single" else "" for pairs in comparison.groups(method)]
    tried = {part: json.loads((folder / f"trial-{rate:g}" / part / "run.json").read_text()) for part in parts}
    assert comparison.run(method, 0) and comparison.run(method, 1)
    assert len(list(folder.rglob("run.json"))) == len(list(folder.rglob("*.safetensors"))) == 2 * len(parts)
    for part in parts:
        at = [json.loads((folder / f"seed-{seed}" / part / "run.json").read_text()) for seed in (0, 1)]
        assert at[0] == tried[part] and [run["depends_on"]["seed"] for run in at] == [0, 1]
    found = collect(comparison.directory)
    assert {trial["updates"] for trial in found["trials"]} == {comparison.updates(method)}
    chosen = next(trial for trial in found["trials"] if trial["learning_rate"] == rate)
    losses = [row["validation_loss"] for row in found["rows"] if row["seed"] == 0]
    assert sum(losses) / len(losses) == pytest.approx(chosen["validation_loss"], rel=1e-12)


def test_the_budget_is_checked(toy_model, toy_tokenizer, toy_data, tmp_path):
    for wrong, message in (
        ({"trial_share": 1.5}, "trial_share must be above 0 and at most 1, got 1.5"),
        ({"evaluations": 0}, "evaluations is a number of at least 1, got 0"),
        ({"tuning_directions": 0}, "tuning_directions is a number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_comparison(toy_model, toy_tokenizer, toy_data, tmp_path, **wrong)


@pytest.mark.parametrize("method", ["lora", "bilingual"])
def test_new_weights_are_those_of_the_seed_also_where_neurons_are_counted_first(comparison, method):
    knobs = comparison.method
    first, again, other = (weights(comparison.untrained(method, seed, knobs)) for seed in (0, 0, 1))
    assert all(again[name].equal(weight) for name, weight in first.items())
    assert any(not other[name].equal(weight) for name, weight in first.items())


def test_what_stages_share_is_made_once_by_whoever_comes_first(comparison, monkeypatch):
    made = []

    def slow(*args, **options):
        made.append(time.sleep(0.5))
        return record_corpus(*args, **options)

    monkeypatch.setattr("neuron_specialization.baselines.models.record_corpus", slow)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: comparison.counts(), range(2))
    assert len(made) == 1 and one.language_pairs == other.language_pairs


def test_a_knob_is_the_best_of_trials_at_the_best_learning_rate(comparison):
    """Controls share the k of ours, and ask for no trial of their own."""
    comparison.stage.knobs = ["ours_k=[0.02, 0.5, 0.9]"]
    comparison.stage.learning_rates = [1e-6, 1e-2]
    comparison.training.max_steps = 12
    comparison.data["test"].clear()
    chosen = comparison.setting("ours")
    trials = collect(comparison.directory)["trials"]
    tried = {(trial["learning_rate"], trial["knobs"].get("k", 0.5)): trial["validation_loss"] for trial in trials}
    assert set(tried) == {(1e-6, 0.5), (1e-2, 0.5), (1e-2, 0.02), (1e-2, 0.9)}, "k = 0.5 was tried already"
    assert tried[1e-2, 0.5] < tried[1e-6, 0.5]
    k = min((0.02, 0.5, 0.9), key=lambda k: tried[1e-2, k])
    assert (chosen.learning_rate, chosen.knobs.k) == (1e-2, k)
    comparison.stage.learning_rates = [1e-2]
    assert {comparison.setting(method).knobs.k for method in ("random_overlap", "masks_only", "gradual")} == {k}
    assert comparison.setting("random_overlap_k=0.3").knobs.k == 0.3
    assert comparison.setting("general_specific").knobs.k == 0.5, "it is none of those made from ours"
    assert len(collect(comparison.directory)["trials"]) == 4


def test_bilingual_models_get_the_dropout_that_validates_best(comparison):
    comparison.stage.knobs = ["bilingual_dropout=[0, 0.9]"]
    comparison.stage.scratch_learning_rates = [1e-2]
    comparison.stage.bilingual_updates = 20
    chosen = comparison.setting("bilingual")
    tried = {trial["knobs"]["dropout"]: trial["validation_loss"] for trial in collect(comparison.directory)["trials"]}
    assert chosen.knobs.dropout == min(tried, key=tried.get) == 0, "no model learns with a tenth of its neurons"
    model = comparison.untrained("bilingual", 0, dataclasses.replace(chosen.knobs, dropout=0.9)).train()
    tokens = torch.tensor([[5, 6, 7, 2]])
    once, again = (model.get_encoder()(tokens).last_hidden_state for _ in range(2))
    assert not once.allclose(again), "dropout is drawn anew"
    assert comparison.baseline.config.dropout == 0


def test_the_words_of_a_grid_are_checked():
    assert knob_grids(["ours_k=[0.9, 0.95]", "low_rank_r=[4, 8]"]) == {
        "ours": {"k": [0.9, 0.95]},
        "low_rank": {"r": [4, 8]},
    }
    for wrong in (
        "ours_q=[1]",
        "k=[1]",
        "fine_tune_dropout=[0, 0.3]",
        "ours_k=[high]",
        "low_rank_r=[2.5]",
        "ours_k=[]",
        "masks_only_k=[0.5, 0.6]",
    ):
        with pytest.raises(ValueError, match="such as ours_k|is not trained"):
            knob_grids([wrong])


def test_lass_is_identified_once_for_all_values_of_alpha(toy_model, toy_tokenizer, toy_data, tmp_path):
    pairs = ["Pv-Aa", "Aa-Pv"]
    data = {split: {pair: of[pair] for pair in pairs} for split, of in toy_data.items()}
    comparison = make_comparison(toy_model, toy_tokenizer, data, tmp_path)
    comparison.stage.knobs = ["lass_alpha=[0.3, 0.7]"]
    assert comparison.run("lass", 0)
    found = collect(comparison.directory)
    (stage,) = found["stages"]
    assert stage["status"] == "done" and stage["knobs"]["alpha"] in (0.3, 0.7)
    folder = comparison.directory / "identification" / "weights"
    runs = {pair: folder / pair / "run.json" for pair in pairs}
    results = {pair: json.loads(path.read_text())["result"] for pair, path in runs.items()}
    assert all(result["updates"] == comparison.stage.single_updates for result in results.values())
    rates = {json.loads(path.read_text())["depends_on"]["learning_rate"] for path in runs.values()}
    assert rates == {comparison.setting("fine_tune_single").learning_rate}
    knobs = dataclasses.replace(comparison.method, alpha=0.3)
    start = weights(comparison.untrained("lass", 0, knobs).get_base_model())
    for name, weight in weights(comparison.baseline).items():
        name = name if name in start else name.replace("fc1.", "fc1.base_layer.")
        assert start[name].equal(weight), "it goes on from the baseline, not from what was fine-tuned on a direction"
    seconds = sum(result["train_runtime"] for result in results.values())
    assert stage["identification_seconds"] == pytest.approx(seconds), "the fine-tuning of each direction is counted"
    masks = load_file(folder / f"masks-{stage['knobs']['alpha']:g}.safetensors")
    matrices = [m for m in comparison.baseline.model.modules() if isinstance(m, torch.nn.Linear)]
    of_a_pair = sum(m.out_features * -(-m.in_features // 8) for m in matrices)
    assert stage["mask_bytes"] == sum(packed.numel() for packed in masks.values()) == len(pairs) * of_a_pair
    assert {path.name for path in folder.glob("masks-*")} == {"masks-0.3.safetensors", "masks-0.7.safetensors"}
    trained = runs["Pv-Aa"].stat().st_mtime_ns
    comparison.weight_masks(0.5)
    assert runs["Pv-Aa"].stat().st_mtime_ns == trained, "another alpha needs no other fine-tuning"
    assert not list(comparison.directory.rglob("checkpoint-*"))
    shared = comparison.shared_weight_masks(0.3)
    assert all(packed[0].equal(packed[1]) for packed in shared.values()), "the control tells pairs apart by nothing"
    assert any(not packed[0].equal(packed[1]) for packed in masks.values())
    built = comparison.untrained("lass_shared", 0, knobs)
    buffers = {n: b for n, b in built.named_buffers() if n.endswith("lass_mask")}
    assert len(buffers) == len(shared) and all(map(torch.equal, buffers.values(), shared.values()))
    exchanged = comparison._exchanged(masks, {"Pv": "Aa", "Aa": "Pv"})
    assert all(packed.equal(masks[name].flip(0)) for name, packed in exchanged.items())
    scored = token_losses(comparison.final_model("lass", 0), comparison.tokenizer, comparison.data["test"])
    assert scored == pytest.approx({row["direction"]: row["loss"] for row in found["rows"]}, rel=1e-5)


def test_a_gradual_stage_ends_with_the_masks_of_ours(comparison):
    assert comparison.run("gradual", 0)
    masks = ns.NeuronMasks.from_pretrained(comparison.directory / "gradual" / "seed-0" / "adapter")
    ours = ns.CumulativeThreshold(comparison.method.k).select(comparison.counts())
    assert all(rows.equal(ours.rows[name]) for name, rows in masks.rows.items())


def test_every_method_builds_a_model_that_runs(counts, toy_model, toy_tokenizer, toy_data):
    families = ["Pv=P", "Aa=A", "Ba=B"]
    args = MethodArguments(k=0.5, exchange=["Aa=Ba", "Ba=Aa"], families=families, adapter_width=4)
    rows = {"Pv-Aa": toy_data["test"]["Pv-Aa"].select(range(2))}
    before = {name: weight.clone() for name, weight in toy_model.state_dict().items()}
    attribution = ns.record_corpus(toy_model, toy_tokenizer, toy_data["validation"], measure="attribution")
    for method in METHODS:
        if method not in LASS:  # its masks are of weights: tests/test_lass.py
            found = attribution if method == "taylor" else counts
            model = build_model(method, toy_model, found, args, "Pv", 0)
            assert token_losses(model, toy_tokenizer, rows)["Pv-Aa"] > 0, method
            if method in (*IDENTIFIED_BY,) and method != "gradual":
                config = model.peft_config["default"]
                parts = {"delta": "delta", "update_only": "delta", "low_rank": "low_rank", "masks_only": "none"}
                assert config.trainable == parts.get(method, "full"), method
                assert config.update_only == (method == "update_only"), method
    assert all(weight.equal(before[name]) for name, weight in toy_model.state_dict().items()), "the baseline is copied"


@pytest.mark.parametrize("families", [None, {"Pv": "P", "Aa": "A", "Ba": "A"}], ids=["per pair", "per family"])
def test_bottleneck_adapters_train_alone_and_serve_their_own(families, toy_model, toy_tokenizer, toy_data, tmp_path):
    before = copy.deepcopy(toy_model).eval()
    adapted = bottleneck_adapters(toy_model, TOY_PAIRS, 4, families)
    rows = {pair: data.select(range(4)) for pair, data in toy_data["test"].items()}
    untrained = token_losses(before, toy_tokenizer, rows)
    assert token_losses(adapted, toy_tokenizer, rows) == pytest.approx(untrained, rel=1e-5)
    start = weights(adapted)
    fit(adapted, toy_tokenizer, {"Pv-Aa": toy_data["train"]["Pv-Aa"]}, None, arguments(tmp_path, max_steps=3))
    moved = {name for name, weight in weights(adapted).items() if not weight.equal(start[name])}
    assert moved and all(".bottleneck." in name for name in moved), "the base is frozen"
    trained = token_losses(adapted, toy_tokenizer, rows)
    changed = {pair for pair in TOY_PAIRS if trained[pair] != pytest.approx(untrained[pair], rel=1e-5)}
    assert "Pv-Aa" in changed
    # Pv-Ba shares both of Pv-Aa's adapters where its languages are of the same families
    assert changed == ({"Pv-Aa"} if families is None else {"Pv-Aa", "Pv-Ba"})
    assert len(ns.translate(adapted, toy_tokenizer, rows["Pv-Aa"]["source"], "Pv-Aa", num_beams=2)) == 4


def test_a_language_without_a_family_is_named(toy_model):
    with pytest.raises(ValueError, match="missing: Ba"):
        bottleneck_adapters(toy_model, TOY_PAIRS, 4, {"Pv": "P", "Aa": "A"})
