import pytest
import torch
from transformers import AutoTokenizer

import neuron_specialization as ns
from neuron_specialization.translation.tokenization import encode, resolve_tokens, train_tokenizer
from neuron_specialization.translation.toy import PIVOT, ToyLanguages


def test_a_trained_tokenizer_is_reloaded_by_auto_tokenizer(toy, toy_tokenizer, tmp_path):
    toy_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sentences = toy.sentences(30, "unseen")
    tokens = resolve_tokens(toy_tokenizer, ["Aa-Pv"])
    mine = encode(toy_tokenizer, "Aa-Pv", sentences["Aa"], sentences["Pv"], tokens)
    assert encode(loaded, "Aa-Pv", sentences["Aa"], sentences["Pv"], tokens) == mine
    assert len(loaded) == len(toy_tokenizer) == max(loaded.get_vocab().values()) + 1
    tags = [loaded.convert_ids_to_tokens(row)[0] for row in (mine["input_ids"][0], mine["labels"][0])]
    assert tags == ["Aa", "Pv"], "source tag on the encoder, target tag on the decoder"
    assert loaded.batch_decode(mine["labels"], skip_special_tokens=True) == sentences["Pv"][:]


def test_truncation_keeps_the_tags(toy_tokenizer):
    tokens = {"Aa": "Aa", "Pv": "Pv"}
    encoded = encode(toy_tokenizer, "Aa-Pv", ["ba " * 50], ["ba " * 50], tokens, max_length=10)
    assert len(encoded["input_ids"][0]) == len(encoded["labels"][0]) == 10
    assert toy_tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])[0] == "Aa"
    assert encoded["input_ids"][0][-1] == toy_tokenizer.eos_token_id


def test_the_target_tag_may_open_the_source(toy_tokenizer):
    encoded = encode(toy_tokenizer, "Pv-Aa", ["ba"], None, {"Aa": "Aa", "Pv": "Pv"}, source_tag="target")
    assert "Aa" in toy_tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])


def test_language_tokens_that_occur_in_the_text_are_refused():
    with pytest.raises(ValueError, match="'ba' occurs in the text .'kizuba'"):
        train_tokenizer(["kizuba"], ["aa", "ba"], 100)


def test_unknown_language_tokens_are_refused(toy_tokenizer):
    with pytest.raises(ValueError, match="Language token not in the tokenizer: 'deu_Latn' for 'de'"):
        resolve_tokens(toy_tokenizer, ["Aa-de"], {"de": "deu_Latn"})
    with pytest.raises(ValueError, match="not in the tokenizer's vocabulary: 'deu_Latn'.*Pv"):
        ns.language_token_ids(toy_tokenizer, {"de": "deu_Latn"})
    with pytest.raises(ValueError, match="share one token"):
        ns.language_token_ids(toy_tokenizer, {"de": "Aa", "nl": "Aa"})
    assert ns.language_token_ids(toy_tokenizer, {"x": "Pv"}) == {"x": toy_tokenizer.convert_tokens_to_ids("Pv")}


def test_toy_languages_depend_on_their_seed_and_relate_as_said():
    toy = ToyLanguages(families=2, languages_per_family=3, seed=1)
    assert toy.languages == [PIVOT, "Aa", "Ab", "Ac", "Ba", "Bb", "Bc"] and len(toy.language_pairs) == 12
    assert toy.sentences(20, "train")[:] == ToyLanguages(seed=1).sentences(20, "train")[:]
    assert toy.sentences(20, "train")[:] != toy.sentences(20, "test")[:]
    assert toy.sentences(20, "train")[:] != ToyLanguages(seed=2).sentences(20, "train")[:]
    within = [toy.distance("Aa", "Ab"), toy.distance("Ab", "Ac"), toy.distance("Ba", "Bc")]
    across = [toy.distance("Aa", "Ba"), toy.distance("Ac", "Bb"), toy.distance(PIVOT, "Aa")]
    assert max(within) < min(across) and toy.distance("Aa", "Aa") == 0
    assert toy.distance("Aa", "Ba") == toy.distance("Ba", "Aa")
    assert torch.tensor(within).mean() < 0.6
    with pytest.raises(ValueError, match="families"):
        ToyLanguages(families=9)
