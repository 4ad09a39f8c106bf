"""Mass, credit and token distributions against sums written out by hand, on real models."""

import pytest
import torch

import neuron_specialization as ns
from neuron_specialization.analysis import mass_recording
from neuron_specialization.analysis.mass_activation import MassActivation
from neuron_specialization.analysis.mass_comparison import compare_mass
from neuron_specialization.analysis.mass_recording import record_mass, trackable_tokens
from neuron_specialization.analysis.mass_report import tag_table

from . import architectures
from .conftest import make_batch, make_m2m100, make_t5

TOKENS = range(60)


def make_fsmt():
    return architectures.make("fsmt")


def hidden_states(model, batch, module, reads_input):
    """What one encoder module reads or returns at real positions: float64 [positions, units]."""
    seen = []
    if reads_input:
        hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        hook = module.register_forward_hook(lambda m, args, out: seen.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    states = seen[0].transpose(0, 1) if type(model).__name__.startswith("FSMT") else seen[0]
    return states[batch["attention_mask"].bool()].double()


@pytest.mark.parametrize("site", ["pre_activation", "neurons", "residual"])
@pytest.mark.parametrize("make", [make_m2m100, make_t5, make_fsmt], ids=["plain", "gated", "fsmt"])
def test_sums_are_those_written_out(site, make):
    model = make()
    pad = model.config.pad_token_id
    batches = [make_batch(seed=i, pad=pad) for i in range(2)]
    for batch in batches:  # FSMT takes decoder inputs only
        batch["decoder_input_ids"] = batch.pop("labels").clamp_min(4)
    mass = record_mass(model, {"en-de": batches}, site, token_ids=TOKENS, progress=False)
    layer = next(name for name in mass.credit if mass.stacks[name] == "encoder")
    module = model.get_submodule(layer)
    if site == "neurons":
        parent = model.get_submodule(layer.rpartition(".")[0])
        module = parent.wo if hasattr(parent, "wo") else parent.fc2
    h = torch.cat([hidden_states(model, batch, module, site == "neurons") for batch in batches])
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    torch.testing.assert_close(mass.positive[layer][0], h.clamp_min(0).sum(0))
    torch.testing.assert_close(mass.negative[layer][0], -h.clamp_max(0).sum(0))
    decides = h
    if make is make_t5 and site == "neurons":  # the product of a gated FFN has another sign than its gate
        decides = torch.cat([hidden_states(model, batch, parent.wi_0, False) for batch in batches])
        assert ((decides > 0) != (h > 0)).any()
    assert mass.active[layer][0].equal((decides > 0).sum(0)) and mass.positions["encoder"].tolist() == [len(h)]
    if site == "neurons":
        counts = ns.record_activations(model, {"en-de": batches}, progress=False)
        assert all(mass.active[name].equal(counts.counts[name]) for name in mass.active)
    best, unit = h.max(1)
    expected = torch.zeros(h.shape[1], 61, dtype=torch.float64)
    for value, u, token in zip(best.tolist(), unit.tolist(), tokens.tolist(), strict=True):
        expected[u, token] += max(value, 0)
    torch.testing.assert_close(mass.token_credit[layer][0], expected)
    torch.testing.assert_close(mass.credit[layer][0], expected.sum(1))
    assert mass.length("en-de", layer).equal((expected[:, :-1] > 0).sum(1))
    assert mass.alive("en-de", layer).equal(expected.sum(1) > 0)
    shares = mass.token_distribution("en-de", layer)
    torch.testing.assert_close(shares.sum(1), mass.alive("en-de", layer).double())
    unit = int(mass.wins[layer][0].argmax())
    (token, share), *others = mass.top_tokens("en-de", layer, unit, count=3)
    assert share == shares[unit, :-1].max() and share == shares[unit, mass.token_ids.index(token)]
    assert [s for _, s in others] == sorted((s for _, s in others), reverse=True)


def test_decoder_positions_stand_for_the_tokens_they_predict():
    model, batch = make_m2m100(), make_batch()
    mass = record_mass(model, {"en-de": [batch]}, stack="decoder", layers=[1], token_ids=TOKENS, progress=False)
    (layer,) = mass.credit
    labels = batch["labels"][batch["labels"] != -100]
    assert mass.positions["decoder"].item() == len(labels)
    credited = (mass.token_credit[layer][0].sum(0) > 0).nonzero().flatten().tolist()
    assert set(credited) <= set(labels.tolist()) and 60 not in credited


def test_recordings_of_parts_add_up_and_survive_a_file(tmp_path):
    model = make_m2m100().double()
    batches = {"a": [make_batch(seed=i) for i in range(3)], "b": [make_batch(seed=9)]}
    tags = {name: [{**b, "token_tags": b["input_ids"] % 3} for b in group] for name, group in batches.items()}
    options = {"token_ids": [5, 6, 7], "tags": ["x", "y", "z"], "progress": False}
    whole = record_mass(model, tags, **options)
    first = record_mass(model, {"a": tags["a"][:1], "b": tags["b"]}, **options)
    rest = record_mass(model, {"a": tags["a"][1:], "b": tags["b"]}, **options)
    total = first + rest
    for layer in whole.credit:
        torch.testing.assert_close(total.token_credit[layer][0], whole.token_credit[layer][0])
        torch.testing.assert_close(total.token_credit[layer][1], 2 * whole.token_credit[layer][1])
        if whole.stacks[layer] == "encoder":
            torch.testing.assert_close(whole.tag_credit[layer].sum(2), whole.credit[layer])
    whole.save(tmp_path / "mass.safetensors")
    (tmp_path / "mass.json").write_text("{}")
    with pytest.raises(ValueError, match="mass.json holds no mass activation"):
        MassActivation.load(tmp_path / "mass.json")
    loaded = MassActivation.load(tmp_path / "mass.safetensors")
    assert list(loaded.credit) == list(whole.credit), "encoder first"
    assert (loaded.names, loaded.tags, loaded.token_ids) == (["a", "b"], ["x", "y", "z"], [5, 6, 7])
    assert all(loaded.token_credit[layer].equal(whole.token_credit[layer]) for layer in whole.credit)
    other = make_m2m100().double()
    torch.nn.init.normal_(ns.find_ffn_blocks(other)[0].down.weight)
    changed = record_mass(other, tags, **options)
    with pytest.raises(ValueError, match="two checkpoints of one architecture"):
        whole + changed
    whole.check_comparable(changed)
    with pytest.raises(ValueError, match="differ in token_ids"):
        whole + record_mass(model, batches, progress=False)
    with pytest.raises(ValueError, match="pass token_ids"):
        record_mass(model, batches, progress=False).length("a", layer)


def test_the_most_frequent_tokens_are_tracked_where_not_all_fit(monkeypatch):
    model = make_m2m100()
    batches = {"a": [make_batch(seed=i) for i in range(3)], "b": [make_batch(seed=9)]}
    assert trackable_tokens(model, batches, 60) == list(range(60))
    cells = 2 * sum(2 * block.d_ff for block in ns.find_ffn_blocks(model)) // 2
    monkeypatch.setattr(mass_recording, "MOST_CELLS", cells * 13 - 1)
    tokens = trackable_tokens(model, batches, 60)
    seen = [
        batch[side][batch[side] != ignored]
        for several in batches.values()
        for batch in several
        for side, ignored in (("input_ids", 1), ("labels", -100))
    ]
    counts = torch.cat(seen).bincount(minlength=60)
    left = [token for token in range(60) if token not in tokens]
    assert len(tokens) == 11 and tokens == sorted(tokens) and counts[tokens].min() >= counts[left].max()
    mass = record_mass(model, batches, token_ids=tokens, progress=False)
    layer = next(iter(mass.credit))
    torch.testing.assert_close(mass.token_distribution("a", layer).sum(1), mass.alive("a", layer).double())
    with pytest.raises(ValueError, match="more than the"):
        record_mass(model, batches, token_ids=[*tokens, left[0]], progress=False)


def test_tags_are_compared_with_their_share_of_the_text():
    batches = [make_batch(seed=i) for i in range(2)]
    for batch in batches:
        batch["token_tags"] = torch.where(batch["attention_mask"].bool(), (batch["input_ids"] < 20).long(), -100)
    tags = ["rest", "low"]
    mass = record_mass(make_m2m100(), {"a": batches}, stack="encoder", tags=tags, progress=False)
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    text, model = tag_table({"model": mass}, "a", batches)
    low = (tokens < 20).double().mean().item()
    assert text == {"model": "share of tokens", "rest": pytest.approx(1 - low), "low": pytest.approx(low)}
    assert model["rest"] + model["low"] == pytest.approx(1)
    by_token = record_mass(make_m2m100(), {"a": batches}, stack="encoder", token_ids=TOKENS, progress=False)
    last = by_token.token_credit[list(by_token.token_credit)[-1]][0].sum(0)  # the last column is of all other tokens
    low_ones = [token < 20 for token in by_token.token_ids]
    assert set(tokens.tolist()) <= set(by_token.token_ids) and last[-1] == 0
    assert model["low"] == pytest.approx((last[:-1][low_ones].sum() / last.sum()).item())


def test_change_between_two_models():
    before, after, batch = make_m2m100(), make_m2m100(), make_batch(batch=8)
    with torch.no_grad():  # swap two neurons, and switch a third one off
        block = after.model.encoder.layers[0].fc1
        alive = record_mass(before, {"a": [batch]}, token_ids=TOKENS, progress=False)
        layer = next(iter(alive.credit))
        first, second, third = alive.credit[layer][0].argsort(descending=True)[:3].tolist()
        block.weight[[first, second]] = block.weight[[second, first]]
        block.bias[[first, second]] = block.bias[[second, first]]
        block.bias[third] = -1e6
    changed = record_mass(after, {"a": [batch]}, token_ids=TOKENS, progress=False)
    same, change = (compare_mass(alive, other, "a", layer) for other in (alive, changed))
    assert same.hellinger[same.shared].abs().max() < 1e-6 and not same.length.any()
    assert change.only_before[third] and not change.shared[third] and change.hellinger[third].isnan()
    assert change.positive[third] < 0 and change.negative[third] == 0
    back = compare_mass(changed, alive, "a", layer)
    assert back.only_after[third] and not back.only_before[third] and not change.only_after[third]
    twice = record_mass(before, {"a": [batch, batch]}, token_ids=TOKENS, progress=False)
    assert compare_mass(alive, twice, "a", layer).positive.abs().max() < 1e-6, "per position"
    p, q = (m.token_distribution("a", layer)[first] for m in (alive, changed))
    assert change.hellinger[first] == pytest.approx(((p.sqrt() - q.sqrt()) ** 2).sum().div(2).sqrt().item(), abs=1e-6)
    swapped = alive.length("a", layer)[second] - alive.length("a", layer)[first]
    assert change.shared[first] and abs(int(change.length[first] - swapped)) <= 2  # the third one's tokens move here


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "attention"}, "site must be one of pre_activation"),
        ({"layers": [0, 7]}, r"no layer \[7\]; the layers are \[0, 1\]"),
        ({"stack": "middle"}, "stack must be"),
        ({"token_ids": range(10**7)}, "more than the"),
        ({"tags": ["NOUN"]}, 'no "token_tags"'),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        record_mass(make_m2m100(), {"a": [make_batch()]}, progress=False, **options)


def test_experts_are_refused():
    with pytest.raises(ValueError, match="tokens of an expert"):
        record_mass(architectures.make("switch_transformers"), {"a": [make_batch(pad=0)]}, progress=False)
