import json
import re
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import neuron_specialization as ns
from neuron_specialization.analysis.overlap import neuron_overlap
from neuron_specialization.analysis.report import write_report
from neuron_specialization.analysis.shapes import random_masks
from neuron_specialization.neurons import adapter_file
from neuron_specialization.neurons.language_pairs import Routes

from .conftest import make_batch, make_m2m100, make_masks


def test_masks_are_equal_if_they_keep_the_same_neurons_of_the_same_pairs(model, masks):
    again = make_masks(model)
    assert masks == again and masks != make_masks(model, k=0.7) and masks != "masks"
    assert ns.NeuronSpecializationConfig(masks=masks) == ns.NeuronSpecializationConfig(masks=again)
    again.rows[next(iter(again.rows))][0, 0] ^= True
    assert masks != again


def test_masks_of_the_same_model_under_other_names_are_refused_by_name(model, masks):
    with pytest.raises(ValueError, match="and no module model.encoder.layers.0.fc1. Load.*with the same class"):
        get_peft_model(model.model, ns.NeuronSpecializationConfig(masks=masks))


BLOCK = "encoder.0"


def masks_of(rows: dict[str, list[list[int]]], pairs: list[str], source_tag: str = "source") -> ns.NeuronMasks:
    tensors = {name: torch.tensor(values, dtype=torch.bool) for name, values in rows.items()}
    stacks = {name: name.split(".")[0] for name in rows}
    return ns.NeuronMasks(tensors, stacks, Routes.per_pair(pairs, source_tag))


@pytest.fixture
def four() -> ns.NeuronMasks:
    encoder = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 1]]
    decoder = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    return masks_of({"encoder.0": encoder, "decoder.0": decoder}, ["en-de", "en-fr", "de-en", "fr-en"])


@pytest.mark.parametrize("width", [1, 7, 8, 9, 20, 64, 100])
def test_packing_loses_nothing_and_pads_with_zeros(width):
    rows = torch.rand(5, width, generator=torch.Generator().manual_seed(width)) < 0.5
    packed = adapter_file.pack_rows(rows)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-width // 8))
    assert adapter_file.unpack_rows(packed, width).equal(rows)
    for row in range(5):  # bit j of byte i is neuron 8 i + j
        assert sum(int(b) << (8 * i) for i, b in enumerate(packed[row])) == sum(
            1 << n for n in range(width) if rows[row, n]
        )


def test_rows_sparsity_and_overlap(four):
    assert four.row("en-de", BLOCK).tolist() == [True, True, False, False]
    assert four.sparsity("de-en") == {"encoder.0": pytest.approx(1 / 4), "decoder.0": pytest.approx(2 / 3)}
    assert four.iou("en-de", "en-fr") == {"encoder.0": pytest.approx(1 / 3), "decoder.0": 0.0}
    with pytest.raises(ValueError, match="no language pair 'en-it'.*Known pairs: en-de, en-fr, de-en, fr-en"):
        four.row("en-it", BLOCK)
    with pytest.raises(ValueError, match="no block 'encoder.9'.*encoder.0"):
        four.row("en-de", "encoder.9")


def test_union_and_intersection(four):
    flipped = masks_of({n: (~r).int().tolist() for n, r in four.rows.items()}, four.language_pairs)
    assert all(rows.all() for rows in four.union(flipped).rows.values())
    with pytest.raises(ValueError, match="would keep no neuron of en-de, en-fr, de-en, fr-en in encoder.0"):
        four.intersection(flipped)
    with pytest.raises(ValueError, match="different models: one has 2 blocks"):
        four.union(masks_of({"encoder.0": [[1]]}, ["en-de"]))
    with pytest.raises(ValueError, match="same language pairs and rows"):
        four.union(four.factorize())


def test_rows_are_combined_by_the_names_of_their_pairs(four):
    turned = four.only("decoder")
    turned = replace(turned, rows={name: rows.flip(0) for name, rows in turned.rows.items()})
    turned = replace(turned, routes=Routes.per_pair(four.language_pairs[::-1]))
    union, intersection = four.union(turned), four.intersection(turned)
    assert union.language_pairs == four.language_pairs and union.rows["encoder.0"].all()
    for combined, stack in ((union, "decoder.0"), (intersection, "decoder.0"), (intersection, "encoder.0")):
        assert combined.rows[stack].equal(four.rows[stack])
    assert union.selector["name"] == "union" and intersection.selector["name"] == "intersection"


def test_overlap_is_of_a_stack_that_the_masks_have():
    masks = masks_of({"decoder.0": [[1, 0], [1, 1]]}, ["en-de", "en-fr"])
    assert masks.mean_overlap("decoder")["en-de"]["en-fr"] == 0.5
    with pytest.raises(ValueError, match=r"a stack of \['decoder'\], got 'encoder'"):
        masks.mean_overlap("encoder")


def test_what_is_combined_knows_the_tokens_of_both(four):
    known = replace(four, language_token_ids={"en": 8})
    for a, b in ((four, known), (known, four), (known, known)):
        assert a.union(b).language_token_ids == {"en": 8}
    with pytest.raises(ValueError, match="different tokens for en"):
        known.intersection(replace(four, language_token_ids={"en": 9}))


def test_only_one_stack(four):
    encoder = four.only("encoder")
    assert encoder.rows["encoder.0"].equal(four.rows["encoder.0"])
    assert encoder.rows["decoder.0"].all()
    with pytest.raises(ValueError, match="'encoder' or 'decoder'"):
        four.only("middle")


def test_factorized_masks_keep_pairs_of_one_language():
    model = make_m2m100()
    masks = make_masks(model, ("en-en", "en-de")).factorize()
    assert set(masks.language_pairs) == {"en-en", "en-de"}
    for name in masks.rows:
        expected = masks.row("en-de", name) if masks.stacks[name] == "encoder" else masks.rows[name][0]
        assert masks.row("en-en", name).equal(expected)


def test_factorized_rows_belong_to_languages(four):
    factorized = four.factorize()
    assert factorized.routes.encoder_rows == ["en", "de", "fr"] and factorized.routes.decoder_rows == [
        "de",
        "fr",
        "en",
    ]
    assert factorized.row("en-fr", "encoder.0").tolist() == [True, True, True, False]  # en-de or en-fr
    assert factorized.row("de-fr", "encoder.0").equal(four.row("de-en", "encoder.0"))
    assert factorized.row("de-fr", "decoder.0").equal(four.row("en-fr", "decoder.0"))
    assert set(factorized.language_pairs) == {"en-de", "en-fr", "de-en", "fr-en", "de-fr", "fr-de"}


def test_zero_shot_pairs_are_composed_through_the_pivot(four):
    composed = four.compose("de-fr")
    assert composed.language_pairs == [*four.language_pairs, "de-fr"]
    assert composed.row("de-fr", "encoder.0").equal(four.row("de-en", "encoder.0"))
    assert composed.row("de-fr", "decoder.0").equal(four.row("en-fr", "decoder.0"))
    with pytest.raises(ValueError, match="no pivot"):
        four.compose("it-fr")


def test_several_pivots_must_be_told_apart():
    pairs = ["de-en", "en-fr", "de-nl", "nl-fr"]
    masks = masks_of({"encoder.0": [[1, 0], [0, 1], [1, 1], [0, 1]], "decoder.0": [[1]] * 4}, pairs)
    with pytest.raises(ValueError, match="several pivots.*en, nl"):
        masks.compose("de-fr")
    assert masks.compose("de-fr", pivot="nl").row("de-fr", "encoder.0").tolist() == [True, True]


@pytest.mark.parametrize("how", [lambda m: m.factorize(), lambda m: m.compose("de-fr")])
def test_masks_of_models_with_the_target_tag_on_the_source_do_not_split(how):
    masks = masks_of({"encoder.0": [[1, 0], [0, 1]]}, ["de-en", "en-fr"], source_tag="target")
    with pytest.raises(ValueError, match="Marian and MADLAD/T5|the Marian"):
        how(masks)


def test_saved_masks_come_back(four, tmp_path):
    four.save_pretrained(tmp_path / "masks")
    loaded = ns.NeuronMasks.from_pretrained(tmp_path / "masks")
    assert loaded.routes == four.routes and loaded.stacks == four.stacks
    assert all(loaded.rows[name].equal(rows) for name, rows in four.rows.items())
    factorized = four.factorize()
    factorized.save_pretrained(tmp_path / "masks")  # in the place of the others
    loaded = ns.NeuronMasks.from_pretrained(tmp_path / "masks")
    assert loaded.language_pairs == factorized.language_pairs
    config = json.loads((tmp_path / "masks" / "adapter_config.json").read_text())
    assert config["language_pairs"] == config["routes"] == [], "pairs that rows imply are not listed"
    assert [p.name for p in tmp_path.iterdir()] == ["masks"], "nothing half-written stays behind"


def test_masks_are_read_from_pickled_weights_too(four, tmp_path):
    four.save_pretrained(tmp_path)
    weights = tmp_path / adapter_file.WEIGHTS_NAME
    torch.save(load_file(weights), tmp_path / adapter_file.PICKLED_WEIGHTS_NAME)
    weights.unlink()
    config = json.loads((tmp_path / adapter_file.CONFIG_NAME).read_text())
    config["weights_digest"] = adapter_file.file_digest(tmp_path / adapter_file.PICKLED_WEIGHTS_NAME)
    (tmp_path / adapter_file.CONFIG_NAME).write_text(json.dumps(config))
    found = ns.NeuronMasks.from_pretrained(tmp_path)
    assert found.routes == four.routes and all(found.rows[name].equal(four.rows[name]) for name in four.rows)


def test_the_file_is_hardly_larger_than_its_bits(tmp_path):
    pairs = [f"x{i}-en" for i in range(60)]
    model = make_m2m100(layers=12, d_model=8, encoder_ffn_dim=4096, decoder_ffn_dim=4096)
    masks = random_masks(model, Routes.per_pair(pairs), 0.8)
    masks.save_pretrained(tmp_path / "large")
    size = sum(file.stat().st_size for file in (tmp_path / "large").iterdir())
    assert (tmp_path / "large" / "adapter_model.safetensors").stat().st_size <= 1.03 * 24 * 4096 * 60 / 8
    assert size <= 1.05 * 24 * 4096 * 60 / 8


def test_the_layers_of_saved_counts_and_masks_stay_in_the_order_of_the_model(tmp_path):
    model = make_m2m100(layers=12)
    blocks = {block.name: block.stack for block in ns.find_ffn_blocks(model)}
    counts = ns.record_activations(model, {p: [make_batch()] for p in ("en-de", "en-fr")}, progress=False)
    counts.save(tmp_path / "counts.safetensors")
    counts = ns.ActivationCounts.load(tmp_path / "counts.safetensors")
    assert list(counts.counts) == list(counts.stacks) == list(blocks) and list(counts.tokens) == ["encoder", "decoder"]
    ns.CumulativeThreshold(0.6).select(counts).save_pretrained(tmp_path / "masks")
    masks = ns.NeuronMasks.from_pretrained(tmp_path / "masks")
    decoder = [name for name, stack in blocks.items() if stack == "decoder"]
    assert list(masks.rows) == list(masks.stacks) == list(blocks)
    assert neuron_overlap(masks, "decoder", "en").blocks == decoder and decoder[2].endswith("layers.2.fc1")
    html = write_report(tmp_path / "report.html", "Deep", masks).read_text()
    shown = json.loads(re.search(r'type="application/json"[^>]*>(.*?)</script>', html, re.S)[1])
    assert [block["name"] for block in shown["blocks"]] == list(blocks)


def tamper(directory, change_tensors=None, change_config=None, fix_digest=True):
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    if change_tensors:
        change_tensors(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")
    if change_config:
        change_config(config)
    if fix_digest:
        config["weights_digest"] = adapter_file.file_digest(directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))


KEY = f"base_model.model.{BLOCK}.neuron_specialization_mask"


@pytest.mark.parametrize(
    ("tensors", "config", "fix_digest", "message"),
    [
        (lambda t: t.update({KEY: t[KEY] | 128}), None, True, "padding bits"),
        (lambda t: t[KEY].zero_(), None, True, "keep no neuron"),
        (lambda t: t.update({KEY: t[KEY].int()}), None, True, "expected uint8"),
        (lambda t: t.update({KEY: t[KEY][:2].clone()}), None, True, "expected uint8"),
        (lambda t: t.pop(KEY), None, True, "lacks base_model"),
        (lambda t: t[KEY].add_(0), lambda c: c.update(format_version=2), True, "format version 2"),
        (None, lambda c: c.update(peft_type="LORA"), True, "type LORA"),
        (lambda t: t[KEY].fill_(15), None, False, "interrupted"),
    ],
)
def test_damaged_files_are_refused(four, tmp_path, tensors, config, fix_digest, message):
    four.save_pretrained(tmp_path / "masks")
    tamper(tmp_path / "masks", tensors, config, fix_digest)
    with pytest.raises(ValueError, match=message):
        ns.NeuronMasks.from_pretrained(tmp_path / "masks")


def test_a_directory_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not an adapter directory: it has no adapter_config.json"):
        ns.NeuronMasks.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a local directory nor a Hub repository"):
        ns.NeuronMasks.from_pretrained(tmp_path / "missing")


def test_saving_empty_rows_is_refused_and_leaves_no_trace(four, tmp_path):
    four.rows[BLOCK][0] = False
    with pytest.raises(ValueError, match="keep no neuron"):
        four.save_pretrained(tmp_path / "masks")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routes": [[0, 0]]}, "one .encoder row, decoder row. for each of the 4 language_pairs"),
        ({"routes": [[0, 0], [1, 1], [2, 2], [3, "3"]]}, "one .encoder row, decoder row. for each"),
        ({"routes": [[0, 0], [1, 1], [2, 2], [4, 3]]}, "routed to encoder row 4"),
        ({"language_pairs": ["en-de", "en-fr", "de-en", "en-de"]}, "repeated: en-de"),
        ({"language_pairs": None}, "language_pairs as a list of names, got None"),
        ({"encoder_rows": "en"}, "encoder_rows as a list of names"),
        ({"decoder_rows": ["a", "b", "c", "a"]}, "decoder row needs a name of its own"),
    ],
)
def test_routes_are_read_strictly(four, change, message):
    with pytest.raises(ValueError, match=message):
        Routes.from_metadata({**four.routes.metadata(), **change})


def test_masks_print_as_a_short_table(four):
    text = repr(four)
    assert "en-de, en-fr, de-en, fr-en" in text and "56.2%" in text and "tensor" not in text
    assert len(text.splitlines()) == 4
    with pytest.raises(ValueError, match="masks must be NeuronMasks.*got a dict"):
        ns.NeuronSpecializationConfig(masks={"encoder.0": four.rows["encoder.0"]})


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("d_ff", "stacks", "routes", "encoder_rows")),
        {"selector": "CumulativeThreshold"},
        {"fingerprint": []},
        {"d_ff": {"encoder.0": "4", "decoder.0": 3}},
        {"stacks": {"encoder.0": "encoder"}},
        {"stacks": {"encoder.0": "encoder", "decoder.0": ["decoder"]}},
        {"source_tag": 3},
        {"routes": {"en-de": [0, 0]}},
        "no JSON",
        "[]",
    ],
)
def test_damaged_configs_are_refused_clearly(four, tmp_path, change):
    four.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="damaged|Expected|source_tag"):
        ns.NeuronMasks.from_pretrained(tmp_path)


def test_masks_of_different_pairs_are_concatenated(four):
    italian = masks_of({"encoder.0": [[1, 1, 1, 0]], "decoder.0": [[0, 1, 1]]}, ["en-it"])
    both = four.concatenate(italian)
    assert both.language_pairs == [*four.language_pairs, "en-it"]
    assert both.row("en-it", BLOCK).tolist() == [True, True, True, False]
    assert both.row("fr-en", BLOCK).equal(four.row("fr-en", BLOCK))
    assert both.concatenate(four).routes == both.routes  # the same rows twice are no conflict


def test_factorized_masks_are_concatenated_by_language(four):
    german, french = (four.factorize().compose(pair) for pair in ("en-de", "en-fr"))
    assert german.concatenate(french).language_pairs[:2] == ["en-de", "en-fr"]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pair_of_rows_by_language_is_not_replaced_by_one_of_its_own_name(four, swapped):
    """Rows of languages imply pairs that they do not list."""
    by_language = four.factorize()
    other = masks_of({"encoder.0": [[0, 0, 1, 1]], "decoder.0": [[1, 0, 0]]}, ["en-de"])
    first, second = (other, by_language) if swapped else (by_language, other)
    with pytest.raises(ValueError, match="Both masks hold en-de, with different rows. Identify one"):
        first.concatenate(second)
    italian = masks_of({"encoder.0": [[0, 0, 1, 1]], "decoder.0": [[1, 0, 0]]}, ["en-it"])
    both = by_language.concatenate(italian)
    assert both.row("en-de", BLOCK).equal(by_language.row("en-de", BLOCK))


def test_masks_of_a_base_that_is_not_told_do_not_hide_that_of_others(four):
    italian, czech, finnish = (
        masks_of({"encoder.0": [[1, 1, 1, 0]], "decoder.0": [[0, 1, 1]]}, [f"en-{code}"])
        for code in ("it", "cs", "fi")
    )
    told = replace(italian, weights_sample=[1.0, 3.0], base_model_name_or_path="me/base")
    both = four.concatenate(told).concatenate(czech)
    assert (both.weights_sample, both.base_model_name_or_path) == ([1.0, 3.0], "me/base")
    with pytest.raises(ValueError, match="different weights .me/base and"):
        both.concatenate(replace(finnish, weights_sample=[1.0, 2.0]))


def test_what_cannot_be_concatenated_is_refused(four):
    other = masks_of({"encoder.0": [[0, 0, 1, 1]], "decoder.0": [[1, 0, 0]]}, ["en-de"])
    with pytest.raises(ValueError, match="Both masks hold en-de.*different neurons in encoder.0. Identify one"):
        four.concatenate(other)
    with pytest.raises(ValueError, match="different models: one has 2 blocks of 3, 4 neurons"):
        four.concatenate(masks_of({"encoder.0": [[1, 1]]}, ["en-it"]))
    italian = masks_of({"encoder.0": [[1, 1, 1, 0]], "decoder.0": [[0, 1, 1]]}, ["en-it"])
    for changes, match in (
        ({"weights_sample": [1.0, 2.0]}, "different weights"),
        ({"fingerprint": {"d_model": 7}}, "different models"),
        ({"language_token_ids": {"en": 9}}, "different tokens for en"),
    ):
        ours = {"weights_sample": [1.0, 3.0], "fingerprint": {"d_model": 8}, "language_token_ids": {"en": 8}}
        with pytest.raises(ValueError, match=match):
            replace(four, **ours).concatenate(replace(italian, **changes))
