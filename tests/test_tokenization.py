import copy
import re

import pytest
import torch
from transformers import AutoTokenizer

import neuron_specialization as ns
from neuron_specialization.analysis.shapes import numbered_words
from neuron_specialization.translation.tokenization import encode, resolve_tokens, train_tokenizer
from neuron_specialization.translation.toy import PIVOT, ToyLanguages

from .test_conventions import CONVENTIONS, TEXT


def test_a_trained_tokenizer_is_reloaded_by_auto_tokenizer(toy, toy_tokenizer, tmp_path):
    toy_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sentences = toy.sentences(30, "unseen")
    tokens = resolve_tokens(toy_tokenizer, ["Aa-Pv"])
    encoded = encode(toy_tokenizer, "Aa-Pv", sentences["Aa"], sentences["Pv"], tokens)
    assert encode(loaded, "Aa-Pv", sentences["Aa"], sentences["Pv"], tokens) == encoded
    assert len(loaded) == len(toy_tokenizer) == max(loaded.get_vocab().values()) + 1
    tags = [loaded.convert_ids_to_tokens(row)[0] for row in (encoded["input_ids"][0], encoded["labels"][0])]
    assert tags == ["Aa", "Pv"], "source tag on the encoder, target tag on the decoder"
    assert loaded.batch_decode(encoded["labels"], skip_special_tokens=True) == sentences["Pv"][:]


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
    with pytest.raises(ValueError, match="Not a language token of the tokenizer: 'deu_Latn' for 'de'"):
        resolve_tokens(toy_tokenizer, ["Aa-de"], {"de": "deu_Latn"})
    with pytest.raises(ValueError, match="Not a language token of the tokenizer: 'deu_Latn' for 'de'.*Pv"):
        ns.language_token_ids(toy_tokenizer, {"de": "deu_Latn"})
    with pytest.raises(ValueError, match="share one token"):
        ns.language_token_ids(toy_tokenizer, {"de": "Aa", "nl": "Aa"})
    assert ns.language_token_ids(toy_tokenizer, {"x": "Pv"}) == {"x": toy_tokenizer.convert_tokens_to_ids("Pv")}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_only_special_or_added_tokens_are_language_tokens(convention, tmp_path):
    """A piece of a word is in the vocabulary, and no model takes it for a tag."""
    tokenizer, tags = CONVENTIONS[convention][0](tmp_path)
    assert resolve_tokens(tokenizer, ["en-de"], tags) == {code: tags[code] for code in ("en", "de")}
    assert ns.language_token_ids(tokenizer, tags) == {c: tokenizer.convert_tokens_to_ids(t) for c, t in tags.items()}
    plain = [token for token in tokenizer.get_vocab() if token.strip("▁").isalpha() and token not in tags.values()]
    pieces = [token for token in plain if token not in tokenizer.get_added_vocab()]
    assert len(pieces) > 10
    for token in [*pieces, tokenizer.eos_token, tokenizer.unk_token]:
        for check in (
            lambda token=token: resolve_tokens(tokenizer, ["en-de"], {**tags, "de": token}),
            lambda token=token: ns.language_token_ids(tokenizer, {"de": token}),
        ):
            with pytest.raises(
                ValueError, match=f"Not a language token.* for 'de'.*{re.escape(tags['fr'])}|100 in all"
            ):
                check()


def test_tokens_that_were_added_can_be_language_tokens(toy_tokenizer):
    tokenizer = copy.deepcopy(toy_tokenizer)
    with pytest.raises(ValueError, match="'<de>' for 'de'"):
        ns.language_token_ids(tokenizer, {"de": "<de>"})
    tokenizer.add_tokens(["<de>"])
    assert ns.language_token_ids(tokenizer, {"de": "<de>"}) == {"de": len(toy_tokenizer)}


def test_a_tokenizer_without_any_language_token_says_so():
    with pytest.raises(ValueError, match="'w5' for 'en'.*it has none"):
        resolve_tokens(numbered_words(10), ["en-de"], {"en": "w5", "de": "w6"})


@pytest.mark.parametrize("convention", [name for name, (*_, tag) in CONVENTIONS.items() if tag == "source"])
def test_encoding_leaves_the_languages_of_the_tokenizer_alone(convention, tmp_path):
    tokenizer, tags = CONVENTIONS[convention][0](tmp_path)
    english, german = ("en", "de") if convention == "m2m100" else (tags["en"], tags["de"])
    tokenizer.src_lang, tokenizer.tgt_lang = german, english
    before = tokenizer(TEXT, text_target=TEXT)
    encode(tokenizer, "fr-de", TEXT, TEXT, tags)
    with pytest.raises(ValueError):
        encode(tokenizer, "fr-de", TEXT, [None], tags)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == (german, english)
    after = tokenizer(TEXT, text_target=TEXT)
    assert (after["input_ids"], after["labels"]) == (before["input_ids"], before["labels"])


def test_tokenizers_that_add_no_tags_are_refused(tmp_path):
    tokenizer, tags = CONVENTIONS["madlad"][0](tmp_path)
    with pytest.raises(ValueError, match="T5Tokenizer adds no language tags.*source_tag='target'"):
        encode(tokenizer, "en-de", TEXT, None, tags)


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


def test_toy_languages_have_as_many_words_as_asked_for():
    few, many = (ToyLanguages(1, 1, roots=roots).sentences(600, "train")["Pv"] for roots in (44, 220))
    words = [
        {word.removesuffix("s").removesuffix("ed") for text in texts for word in text.split()} for texts in (few, many)
    ]
    assert 40 <= len(words[0]) <= 44 < 200 <= len(words[1]) <= 220
    with pytest.raises(ValueError, match="multiple of 11"):
        ToyLanguages(roots=50)
    with pytest.raises(ValueError, match="replaced is a share of roots, between 0 and 1; got 1.5"):
        ToyLanguages(replaced=1.5)
