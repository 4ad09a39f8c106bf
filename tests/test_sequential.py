"""Sequential transfer: what is trained from what, what stays frozen, and what the matrix of scores says."""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, load_peft_weights

import neuron_specialization as ns
from neuron_specialization.analysis.forgetting import robustness_table, score_matrix, transfer_of, transfer_table
from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.analysis.pruning import NO_MASS, for_pairs, mass_shares
from neuron_specialization.analysis.pruning_choices import check_choices, choose, pruning_table
from neuron_specialization.baselines.freezing import frozen_parameters
from neuron_specialization.baselines.pruned import (
    PruneArguments,
    Pruning,
    check_stages,
    collect_pruned,
    exported_stages,
    pruned_stages,
)
from neuron_specialization.baselines.sequential import SequentialTransfer
from neuron_specialization.baselines.transfer_data import check_against_all, sentences_to_copy
from neuron_specialization.baselines.transfer_plan import (
    BILINGUAL,
    JOINT,
    MASKS,
    PRETRAINING,
    SEQUENTIAL,
    SequentialArguments,
    Stage,
    collect,
)
from neuron_specialization.export.compaction import compact
from neuron_specialization.translation.checkpoints import new_model
from neuron_specialization.translation.noise import NoiseArguments
from neuron_specialization.translation.tokenization import encode, resolve_tokens

from .conftest import make_m2m100, make_masks, make_t5
from .test_training import arguments, weights

PAIRS = ["Pv-Aa", "Pv-Ba"]
ORDERS = ["Pv-Aa/Pv-Ba", "Pv-Ba/Pv-Aa"]


def make_transfer(tokenizer, toy_data, directory) -> SequentialTransfer:
    data = {split: {pair: of[pair].select(range(16)) for pair in PAIRS} for split, of in toy_data.items()}
    copying = {
        split: {"Pv-Pv": sentences_to_copy(data[split], [data["test"]], 0.2)["Pv-Pv"]}
        for split in ("train", "validation")
    }
    torch.manual_seed(0)
    shape = {"layers": 1, "d_model": 16, "d_ff": 32, "heads": 2, "dropout": 0.0, "max_length": 64}
    model = new_model(tokenizer, **shape, activation="gelu", tie_embeddings=False)
    model.generation_config.max_length = 12
    plan = SequentialArguments(
        orders=ORDERS[:1], freeze=["encoder"], pretraining_updates=2, evaluations=1, num_beams=1, k=0.5
    )
    training = arguments(directory, max_steps=3, per_device_eval_batch_size=16)
    return SequentialTransfer(model, tokenizer, data, copying, plan, NoiseArguments(), training, max_length=64)


@pytest.fixture
def transfer(toy_tokenizer, toy_data, tmp_path):
    return make_transfer(toy_tokenizer, toy_data, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(toy_tokenizer, toy_data, tmp_path_factory):
    """A transfer whose stages are all done."""
    transfer = make_transfer(toy_tokenizer, toy_data, tmp_path_factory.mktemp("transfer"))
    for stage in transfer.stages():
        transfer.run(stage)
    return transfer


def again(transfer, **changes):
    fields = {field.name: getattr(transfer, field.name) for field in dataclasses.fields(transfer)}
    return SequentialTransfer(**{**fields, **changes})


def test_every_stage_starts_from_the_right_model_and_every_pair_is_scored(finished):
    stages = finished.stages()
    assert len(stages) == 1 + 2 + 1 + 2 + 2, "pre-training, an order of two, joint, two bilingual, and under masks"
    assert all(stage.start is None or stage.start in stages[:i] for i, stage in enumerate(stages))
    found = collect(finished.directory)
    assert set(found["signatures"]) == {row["direction"] for row in found["rows"]}
    assert all(of["bleu_signature"].startswith("nrefs:1") for of in found["signatures"].values())
    assert len(found["stages"]) == len(stages)
    updates = {stage["method"]: stage["updates"] for stage in found["stages"]}
    assert updates == {PRETRAINING: 2, JOINT: 6, BILINGUAL: 3, SEQUENTIAL: 3, MASKS: 3}
    sizes = {name: parameter.numel() for name, parameter in finished.model.named_parameters()}
    used = sum(sizes.values()) - sizes["model.shared.weight"]  # each stack has an embedding of its own
    steps = used - sum(size for name, size in sizes.items() if name.startswith("model.encoder."))
    trained = {stage["method"]: stage["trainable_parameters"] for stage in found["stages"]}
    assert trained == {PRETRAINING: used, JOINT: used, BILINGUAL: used, SEQUENTIAL: steps, MASKS: steps}
    for method in (SEQUENTIAL, MASKS):
        matrix = score_matrix(found["rows"], ORDERS[0], "loss", method)
        assert matrix.shape == (3, 2) and np.isfinite(matrix).all()
        assert matrix[1, 0] < matrix[0, 0] and matrix[2, 1] < matrix[1, 1], "a step lowers the loss of its pair"
    table = transfer_table(found["rows"], ORDERS, "loss")
    assert [row["method"] for row in table] == ["sequential", "masks", "joint", "bilingual"]
    assert all(np.isfinite(value) for row in table for value in row.values() if isinstance(value, float))

    one, two = (Stage(SEQUENTIAL, 0, tuple(PAIRS[:i])) for i in (1, 2))
    before, first, second = (weights(finished.load(stage)) for stage in (Stage(PRETRAINING, 0), one, two))
    for name in before:
        still = name.startswith("model.encoder") or name == "model.shared.weight"
        assert first[name].equal(before[name]) == second[name].equal(first[name]) == still, name
    assert not list(finished.directory.rglob("checkpoint-*"))

    rows = found["robustness"]
    assert {(r["method"], r["order"]) for r in rows} == {
        *((method, ORDERS[0]) for method in (SEQUENTIAL, MASKS)),
        *((BILINGUAL, pair) for pair in PAIRS),
        (JOINT, ""),
    }
    lines = {(line["method"], line["noise"]): line for line in robustness_table(rows)}
    assert len(lines) == 2 * 4
    for (method, noise), line in lines.items():
        of = [row for row in rows if (row["method"], row["noise"]) == (method, noise)]
        assert line["clean"] == pytest.approx(np.mean([row["clean bleu"] for row in of])), method
        assert line["noisy"] == pytest.approx(np.mean([row["bleu"] for row in of])), method
        assert line["drop"] == pytest.approx(line["clean"] - line["noisy"])


def test_tables_of_transfer_and_pruning_are_those_written_out():
    def row(method, order, step, scores):
        about = {"method": method, "order": order, "seed": 0, "step": step}
        return [
            {**about, "direction": pair, "bleu": score} for pair, score in zip(("a-b", "a-c"), scores, strict=True)
        ]

    rows = row("pretraining", "", 0, (0, 0)) + row("joint", "", 1, (20, 30))
    rows += row("bilingual", "a-c", 1, (0, 12))[1:] + row("bilingual", "a-b", 1, (8, 0))[:1]  # in another order
    rows += row("sequential", "a-b", 1, (10, 1)) + row("sequential", "a-b/a-c", 2, (4, 15))
    table = {line["method"]: line for line in transfer_table(rows, ["a-b/a-c"])}
    assert table["joint"]["final"] == 25 and table["bilingual"]["final"] == 10
    assert table["sequential"]["forward"] == pytest.approx(np.mean([10 - 8, 15 - 12]))
    assert table["sequential"]["forgetting"] == 6 and table["sequential"]["backward"] == -6

    shares = {"positive mass": 0.1, "negative mass": 0.2, "loss": 1.0}
    about = {**rows[-1], "when": "after", "scope": "layer", "rate": 0.1, **shares}
    whole, pruned = (
        [
            {
                **about,
                "criterion": name,
                "pruned": share,
                "draw": 0,
                "direction": pair,
                "bleu": b,
                "noisy bleu": n,
            }
            for pair, b, n in zip(("a-b", "a-c"), bleu, noisy, strict=True)
        ]
        for name, share, bleu, noisy in (("none", 0, (4, 16), (3, 13)), ("dead", 0.1, (4, 10), (3, 9)))
    )
    lines = {line["criterion"]: line for line in pruning_table(rows, [*whole, *pruned])}
    assert lines["dead"]["change"] == 7 - 10 and lines["none"]["change"] == 0
    assert lines["none"]["noise costs"] == 10 - 8 and lines["dead"]["noise costs"] == 7 - 6


def test_under_masks_a_pair_leaves_the_neurons_of_the_others_alone(finished):
    models = [finished.load(Stage(MASKS, 0, tuple(PAIRS[:step]))) for step in (1, 2)]
    config = models[0].peft_config["default"]
    pretrained = finished.load(Stage(PRETRAINING, 0))
    kept = finished.masks(0)
    for block in (name for name, stack in config.stacks.items() if stack == "decoder"):  # the encoder is frozen
        before = pretrained.get_submodule(block).weight
        first, second = (model.get_base_model().get_submodule(f"{block}.base_layer").weight for model in models)
        of_first, of_second = (kept.row(pair, block) for pair in PAIRS)
        assert first[~of_first].equal(before[~of_first]) and not first[of_first].equal(before[of_first])
        assert second[~of_second].equal(first[~of_second])


def test_a_stage_that_is_done_is_skipped_and_other_settings_are_refused(transfer):
    stage = Stage(PRETRAINING, 0)
    transfer.run(stage)
    part = transfer.directory / stage.path / "part.json"
    written = part.stat().st_mtime_ns
    again(transfer, plan=dataclasses.replace(transfer.plan, orders=ORDERS[:1], seeds=2)).run(stage)
    assert part.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"other settings \(word_dropout\)"):
        again(transfer, plan=dataclasses.replace(transfer.plan, word_dropout=0.3))
    pair = PAIRS[0]
    other = transfer.data["train"][pair].map(lambda row: {"target": row["target"] + "!"})
    train = {**transfer.data["train"], pair: other}
    with pytest.raises(ValueError, match=r"other settings \(text\)"):
        again(transfer, data={**transfer.data, "train": train})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": ["Pv-Aa"]}, "orders holds the language pairs"),
        ({"orders": []}, "got none"),
        ({"freeze": ["encodr"]}, "nothing in this model is called 'encodr'"),
        ({"freeze": ["encoder", "none", "none"]}, "one for each of 2"),
        ({"freeze": ["model+lm_head"]}, "nothing is left to train"),
        ({"compare": ["lora"]}, "compare takes any of"),
        ({"compare": ["joint", "none"]}, "or none, got none"),
        ({"k": 0.0}, "k"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_written(changes, message, transfer, tmp_path):
    training = arguments(tmp_path / "other")
    with pytest.raises(ValueError, match=re.escape(message)):
        again(transfer, plan=dataclasses.replace(transfer.plan, **changes), training=training)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_scored_is_refused_before_training(transfer, tmp_path, monkeypatch):
    training, positions = arguments(tmp_path / "other"), "tokens, but the model has positions for"
    test = {pair: Dataset.from_dict({"source": ["ba " * 70], "target": ["ba"]}) for pair in PAIRS}
    with pytest.raises(ValueError, match=positions):
        again(transfer, data={**transfer.data, "test": test}, training=training)
    tokens = resolve_tokens(transfer.tokenizer, PAIRS, None)
    scored = [(pair, transfer.data[split][pair]) for split in ("validation", "test") for pair in PAIRS]
    clean = [encode(transfer.tokenizer, p, rows["source"], rows["target"], tokens, "source") for p, rows in scored]
    lengths = (len(ids) for each in clean for side in each.values() for ids in side)
    transfer.model.config.max_position_embeddings = max(lengths)
    quiet, loud = (NoiseArguments(swap=0.0, drop=0.0, repeat=rate, case=0.0) for rate in (0.0, 0.9))
    again(transfer, noise=quiet, training=arguments(tmp_path / "fits"))
    with pytest.raises(ValueError, match=positions):
        again(transfer, noise=loud, training=training)
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    pairs = {split: {"Pv-ja": of[PAIRS[0]]} for split, of in transfer.data.items()}
    plan = dataclasses.replace(transfer.plan, orders=["Pv-ja"])
    with pytest.raises(ImportError, match="into 'ja' needs a word segmenter"):
        again(transfer, data=pairs, plan=plan, training=training)
    assert not (tmp_path / "other").exists()


def test_models_are_recorded_on_text_of_the_length_they_are_trained_on(transfer):
    short = again(transfer, max_length=5, training=arguments(transfer.directory / "short"))
    for of, longest in ((transfer, 64), (short, 5)):
        lengths = {
            batch[side].shape[1]
            for batches in of.batches(of.model).values()
            for batch in batches
            for side in ("input_ids", "labels")
        }
        assert max(lengths) <= longest and (of is transfer) == (max(lengths) > 5)
        stage = Stage(PRETRAINING, 0)
        of.model.save_pretrained(of.directory / stage.path / "model")
        of.masks(0)
        counts = ns.ActivationCounts.load(of.directory / stage.path / "counts.safetensors")
        (batches,) = {len(rows) for rows in of.data["validation"].values()}
        assert (of is short) == bool((counts.tokens["encoder"] <= 5 * batches).all())
    short.model.config.max_position_embeddings = 3
    assert all(batch["input_ids"].shape[1] <= 3 for batch in short.batches(short.model)[PAIRS[0]])


def test_all_orders_share_their_beginnings(transfer):
    plan = dataclasses.replace(transfer.plan, orders=["all"], compare=["none"])
    assert [stage.trained for stage in again(transfer, plan=plan).stages()[1:]] == [
        *(("Pv-Aa",), ("Pv-Aa", "Pv-Ba"), ("Pv-Ba",), ("Pv-Ba", "Pv-Aa"))
    ]


def test_what_is_frozen():
    tied, untied, t5 = make_m2m100(), make_m2m100(tie_word_embeddings=False), make_t5()
    names = lambda model, what: {  # noqa: E731
        name
        for name, parameter in model.named_parameters()
        if any(parameter is frozen for frozen in frozen_parameters(model, what))
    }
    assert "model.shared.weight" not in names(tied, "encoder"), "the decoder uses it too"
    assert "model.encoder.embed_tokens.weight" in names(untied, "encoder")
    assert names(untied, "encoder") == {n for n, _ in untied.named_parameters() if n.startswith("model.encoder.")}
    assert names(t5, "embeddings") == {"shared.weight"} or "lm_head.weight" in names(t5, "embeddings")
    assert names(t5, "encoder") and all(name.startswith("encoder.") for name in names(t5, "encoder"))
    both = names(tied, "decoder+embeddings")
    assert both == {n for n, _ in tied.named_parameters() if not n.startswith("model.encoder.")}
    assert names(tied, "none") == set()
    assert names(tied, "model.encoder.layers.1.fc1") == {"model.encoder.layers.1.fc1." + w for w in ("weight", "bias")}
    assert all(parameter.requires_grad for parameter in tied.parameters()), "asking changes nothing"
    weight = "model.decoder.layers.0.fc1.weight"
    config = ns.NeuronSpecializationConfig(masks=make_masks(tied), trainable="full", task_type="SEQ_2_SEQ_LM")
    masked = get_peft_model(tied, config).get_base_model()
    assert names(masked, weight) == {"model.decoder.layers.0.fc1.base_layer.weight"}


def test_forgetting_and_transfer_of_a_known_matrix():
    matrix = np.array([[1, 2, 0], [20, 3, 1], [15, 30, 4], [5, 31, 25]])
    found = transfer_of(matrix, bilingual=[18, 33, 20])
    assert found["diagonal"] == [20, 30, 25] and found["final"] == [5, 31, 25]
    assert found["zero_shot"] == [1, 3, 4]
    assert found["forgetting"] == [15, -1] and found["backward"] == [-15, 1]
    assert found["forward"] == [2, -3, 5]
    assert found["mean"]["forgetting"] == 7 and found["mean"]["forward"] == pytest.approx(4 / 3)
    alone = transfer_of(matrix[:2, :1])
    assert alone["forgetting"] == [] and "forgetting" not in alone["mean"] and "forward" not in alone


def test_text_to_copy_is_of_no_held_out_sentence(toy_data):
    train = {pair: toy_data["train"][pair].select(range(20)) for pair in (*PAIRS, "Aa-Pv")}
    reserved = {"Pv-Ba": toy_data["train"]["Pv-Ba"].select(range(5))}
    copying = sentences_to_copy(train, [reserved], word_dropout=0.3)
    assert list(copying) == ["Pv-Pv", "Aa-Aa"]
    targets = list(copying["Pv-Pv"]["target"])
    assert len(targets) == len(set(targets)) and not set(targets) & set(reserved["Pv-Ba"]["source"])
    for source, target in zip(copying["Pv-Pv"]["source"], targets, strict=True):
        words = iter(target.split())
        assert source and all(word in words for word in source.split()), "words are left out, none is added"
    assert sum(len(s.split()) for s in copying["Pv-Pv"]["source"]) < sum(len(t.split()) for t in targets)
    with pytest.raises(ValueError, match="No sentence is left to copy for Pv-Pv"):
        sentences_to_copy(reserved, [reserved])
    checked, counts = check_against_all(train, [reserved], drop=True)
    assert counts["Pv-Aa"].overlap >= 5 and not set(checked["Pv-Aa"]["source"]) & set(reserved["Pv-Ba"]["source"])


def test_models_are_pruned_after_a_step_before_it_and_trained_again(finished, tmp_path):
    arguments = PruneArguments(
        transfer_dir="",
        criteria=["least_activated", "random"],
        rates=[0.25],
        when=["after", "before", "retrained"],
        draws=2,
        retraining_updates=1,
    )
    check_stages(arguments, finished)
    planned = list(pruned_stages(arguments, finished))
    assert len(planned) == 3 * (1 + 1 + 2)
    stages = [each for each in planned if each.when == "after" or each.criterion == "least_activated"]
    pruning = Pruning(finished, tmp_path, arguments.retraining_updates)
    kept = {}
    for pruned in stages:
        model = finished.load(pruned.start)
        mass = record_mass(model, finished.batches(model), progress=False)
        if pruned.criterion != "none":
            chosen = choose(mass, pruned.criterion, 0.25, draw=pruned.draw)
            kept[pruned] = for_pairs(chosen, finished.language_pairs)
        pruning.run(pruned, kept.get(pruned), mass_shares(kept[pruned], mass) if pruned in kept else NO_MASS)
        assert pruning.is_done(pruned)
    rows = collect_pruned(tmp_path)
    assert len(rows) == 2 * len(stages) and all(np.isfinite(row["loss"]) for row in rows)
    assert {row["pruned"] for row in rows} == {0, 0.25}
    assert {(row["when"], row["updates"]) for row in rows} == {("after", 0), ("before", 3), ("retrained", 1)}
    table = pruning_table(collect(finished.directory)["rows"], rows)
    after = [line for line in table if line["when"] == "after"]
    assert {(line["criterion"], line["draws"]) for line in after} == {
        *(("none", 1), ("least_activated", 1), ("random", 2))
    }
    columns = {"bleu", "change", "forgetting", "noisy bleu", "noise costs", "positive mass", "negative mass"}
    assert all(columns <= line.keys() for line in after)
    assert all(0 < line["positive mass"] < 1 for line in after if line["criterion"] != "none")
    (drawn,) = (line for line in after if line["draws"] == 2)
    assert drawn["lowest"] <= drawn["bleu"] <= drawn["highest"]
    whole = {row["direction"]: row["loss"] for row in rows if row["criterion"] == "none"}
    transferred = collect(finished.directory)["rows"]
    assert whole == {
        r["direction"]: r["loss"] for r in transferred if (r["method"], r["order"]) == (SEQUENTIAL, ORDERS[0])
    }

    before = next(each for each in stages if each.when == "before")
    trained = load_peft_weights(str(tmp_path / before.path / "adapter"), device="cpu")
    start = finished.load(before.start)
    for block, rows in kept[before].rows.items():
        weight, old = trained[f"base_model.model.{block}.base_layer.weight"], start.get_submodule(block).weight
        assert weight[~rows[0]].equal(old[~rows[0]]), "pruned neurons do not train"
        assert "encoder" in block or not weight[rows[0]].equal(old[rows[0]])
    smaller = compact(pruning.export(stages[1], kept[stages[1]]), PAIRS[0])
    assert {block.d_ff for block in ns.find_ffn_blocks(smaller)} == {24}


def test_pruned_stages_of_other_settings_or_models_are_refused(finished, tmp_path):
    moved = shutil.copytree(finished.directory, tmp_path / "transfer")
    copied = again(finished, training=arguments(moved, max_steps=3, per_device_eval_batch_size=16))
    Pruning(copied, tmp_path / "pruned")
    Pruning(copied, tmp_path / "pruned", 2)
    Pruning(copied, tmp_path / "pruned")
    with pytest.raises(ValueError, match=r"other settings \(retraining_updates\)"):
        Pruning(copied, tmp_path / "pruned", 3)
    with pytest.raises(ValueError, match=r"other settings \(num_beams\)"):
        beams = dataclasses.replace(copied.plan, num_beams=2)
        Pruning(again(copied, plan=beams, training=arguments(tmp_path / "new", max_steps=3)), tmp_path / "pruned")
    part = moved / Stage(SEQUENTIAL, 0, tuple(PAIRS[:1])).path / "part.json"
    results = json.loads(part.read_text())
    results["rows"][0]["loss"] += 1e-9
    part.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=rf"other settings \(losses of seed 0, sequential/{PAIRS[0]}\)"):
        Pruning(copied, tmp_path / "pruned")


def test_what_knows_no_scope_is_pruned_once(finished):
    plan = {"transfer_dir": "", "criteria": ["dead", "unspecialized:Pv-Aa"], "rates": [0.1]}
    planned = list(pruned_stages(PruneArguments(**plan, scopes=["global", "layer"]), finished))
    assert [(each.criterion, each.scope) for each in planned] == [
        *(("none", "layer"), ("dead", "global"), ("dead", "layer"), ("unspecialized:Pv-Aa", "global"))
    ]


def test_pruning_is_refused_before_anything_is_recorded(transfer):
    model = transfer.model
    for choice in ("alive", "unspecialized", "unspecialized:Pv-Xx", "mass_matched:alive", "dead:Pv-Aa"):
        with pytest.raises(ValueError, match="Expected criteria of dead, .*" + re.escape(repr(choice))):
            check_choices([choice], [0.1], ["layer"], PAIRS, model)
    with pytest.raises(ValueError, match=r"share in \[0, 1\), got 1.0"):
        check_choices(["dead"], [1.0], ["layer"], PAIRS, model)
    with pytest.raises(ValueError, match="scopes are layer and global"):
        check_choices(["dead"], [0.1], ["stack"], PAIRS, model)
    check_choices(["mass_matched:most_negative"], [0.1], ["layer"], PAIRS, model)
    with pytest.raises(ValueError, match="'most_negative' needs neurons with negative values"):
        check_choices(["most_negative"], [0.1], ["layer"], PAIRS, make_m2m100())
    for changes, message in (
        ({"when": ["during"]}, "when takes any of after"),
        ({"steps": [3]}, "numbers from 1 to 2"),
        ({"when": ["retrained"]}, "Set retraining_updates"),
        ({}, "run transfer_sequentially.py to its end"),
    ):
        with pytest.raises(ValueError, match=message):
            check_stages(PruneArguments(transfer_dir="", **changes), transfer)
    for choice in ("specialized", "mass_matched:general"):
        check_choices([choice], [0.1], ["layer"], ["en-de", "en-fr"], model)
        with pytest.raises(ValueError, match=f"'{choice}' compares .*; en-de has one of each"):
            check_choices([choice], [0.1], ["layer"], ["en-de"], model)
    exported = exported_stages([("dead", 0.1), ("dead", 0.2)], "layer", transfer)
    assert [(pruned.criterion, pruned.rate) for pruned in exported] == [("dead", 0.1), ("dead", 0.2)]
    with pytest.raises(ValueError, match="run transfer_sequentially.py to its end"):
        check_stages(PruneArguments(transfer_dir="", when=[]), transfer, exported)
