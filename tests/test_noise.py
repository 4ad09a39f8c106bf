"""Noise on source sentences: seeded, at its rates, and words that really raise the loss."""

import random

import pytest
from datasets import Dataset

from neuron_specialization.translation import noise as noise_module
from neuron_specialization.translation.noise import NoiseArguments, drop_words, noisy_characters, substitute_words
from neuron_specialization.translation.token_loss import token_losses
from neuron_specialization.translation.training import fit

from .test_training import arguments

NONE = {"swap": 0.0, "drop": 0.0, "repeat": 0.0, "case": 0.0, "substitute": 0.0}
SENTENCES = [f"Sentence number {i} has letters, digits and words!" for i in range(400)]


@pytest.mark.parametrize("kind", ["swap", "drop", "repeat", "case"])
def test_each_kind_has_its_rate_and_touches_letters_only(kind):
    noise = NoiseArguments(**{**NONE, kind: 0.1}, noise_seed=3)
    noisy = noisy_characters(SENTENCES, noise)
    assert noisy == noisy_characters(SENTENCES, noise) and noisy != SENTENCES
    assert noisy != noisy_characters(SENTENCES, NoiseArguments(**{**NONE, kind: 0.1}, noise_seed=4))
    letters = sum(c.isalpha() for s in SENTENCES for c in s)
    grown = sum(map(len, noisy)) - sum(map(len, SENTENCES))
    flipped = sum(c.isupper() for s in noisy for c in s) - sum(c.isupper() for s in SENTENCES for c in s)
    expected = {"swap": 0, "drop": -0.1, "repeat": 0.1, "case": 0}[kind] * letters
    assert grown == pytest.approx(expected, rel=0.1)
    if kind in ("swap", "case"):
        changed = sum(a != b for x, y in zip(SENTENCES, noisy, strict=True) for a, b in zip(x, y, strict=True))
        assert 0.07 * letters < changed < 0.22 * letters
        assert (flipped > 0) == (kind == "case")
    if kind == "swap":
        assert [sorted(x.split()[-1]) for x in noisy] == [sorted(x.split()[-1]) for x in SENTENCES]
    kept = [[c for c in s if not c.isalpha()] for s in noisy]
    assert kept == [[c for c in s if not c.isalpha()] for s in SENTENCES]


def test_the_noise_of_a_sentence_does_not_depend_on_the_other_rates():
    one, both = (noisy_characters(SENTENCES, NoiseArguments(**{**NONE, "drop": 0.1, "case": c})) for c in (0.0, 0.2))
    assert [s.lower() for s in one] == [s.lower() for s in both] and one != both
    assert noisy_characters(SENTENCES, NoiseArguments(**NONE)) == SENTENCES


def test_rates_are_checked():
    with pytest.raises(ValueError, match=r"swap is a share in \[0, 1\), got 1.5"):
        NoiseArguments(swap=1.5)
    with pytest.raises(ValueError, match=r"share in \[0, 1\)"):
        drop_words(["a b"], 1.0)
    assert drop_words(["a b c", "d", ""], 0.999) in (["a", "d", ""], ["b", "d", ""], ["c", "d", ""])


def test_substituted_words_raise_the_loss_more_than_any_others(toy_model, toy_tokenizer, toy_data, tmp_path):
    pair = "Pv-Aa"
    train = {pair: toy_data["train"][pair]}
    fit(toy_model, toy_tokenizer, train, None, arguments(tmp_path, max_steps=40, learning_rate=3e-3))
    rows = toy_data["test"][pair]
    attacked = substitute_words(toy_model, toy_tokenizer, rows, pair, 0.2, neighbors=1000, batch_size=7)
    assert attacked == substitute_words(toy_model, toy_tokenizer, rows, pair, 0.2, neighbors=1000, batch_size=20)
    assert substitute_words(toy_model, toy_tokenizer, rows, pair, 0.0) == list(rows["source"])
    for before, after in zip(rows["source"], attacked, strict=True):
        words = list(zip(before.split(), after.split(), strict=True))
        assert sum(a != b for a, b in words) <= max(1, round(0.2 * len(words)))
    assert sum(a != b for a, b in zip(rows["source"], attacked, strict=True)) > 0.5 * len(rows)
    draw = random.Random(0)
    new_words = sorted({word for sentence in attacked for word in sentence.split()})
    at_random = [
        " ".join(a if a == b else draw.choice(new_words) for a, b in zip(x.split(), y.split(), strict=True))
        for x, y in zip(rows["source"], attacked, strict=True)
    ]

    def loss(sources):
        data = {pair: Dataset.from_dict({"source": sources, "target": rows["target"]})}
        return token_losses(toy_model, toy_tokenizer, data)[pair]

    assert loss(attacked) > loss(at_random) > loss(list(rows["source"]))


def test_noise_that_fails_leaves_the_model_in_its_mode(toy_model, toy_tokenizer, toy_data, monkeypatch):
    def fail(*_):
        assert not toy_model.training
        raise RuntimeError("out of memory")

    monkeypatch.setattr(noise_module, "_gradients", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        substitute_words(toy_model.train(), toy_tokenizer, toy_data["test"]["Pv-Aa"], "Pv-Aa", 0.2)
    assert toy_model.training
