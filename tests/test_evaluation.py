"""Translating and scoring."""

import io
import sys
from contextlib import nullcontext

import pytest
import sacrebleu
from datasets import Dataset
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, MBartConfig, MBartForConditionalGeneration

import neuron_specialization as ns
from neuron_specialization.neurons.stability import stability
from neuron_specialization.translation.evaluation import (
    averages,
    bleu_tokenizer,
    check_scorers,
    evaluate,
    score,
    score_rows,
)
from neuron_specialization.translation.identification import record_corpus, record_corpus_parts
from neuron_specialization.translation.long_sentences import _halves, join_pieces
from neuron_specialization.translation.token_loss import check_positions
from neuron_specialization.translation.translate import translate_tokens

from .conftest import make_m2m100
from .test_conventions import TEXT, m2m_model, nllb
from .test_runs import transformers_logs
from .test_selection import counts_of

HYPOTHESES = ["the cat sat on the mat .", "there is a dog"]
REFERENCES = ["the cat sat on a mat .", "there was a dog here"]


def test_scores_are_sacrebleus_with_their_signatures():
    scores = score(HYPOTHESES, REFERENCES, "de")
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF(word_order=2)
    assert scores["bleu"] == pytest.approx(bleu.corpus_score(HYPOTHESES, [REFERENCES]).score)
    assert scores["chrf++"] == pytest.approx(chrf.corpus_score(HYPOTHESES, [REFERENCES]).score)
    assert scores["bleu_signature"] == str(bleu.get_signature()) and "tok:13a" in scores["bleu_signature"]
    assert "nw:2" in scores["chrf++_signature"]


def test_unsegmented_languages_have_their_own_bleu_tokenizer():
    chinese = ["我 喜欢 猫".replace(" ", ""), "今天天气很好"]
    scores = score(chinese, ["我喜欢狗", "今天天气不好"], "zho_Hans")
    assert "tok:zh" in scores["bleu_signature"] and scores["bleu"] > 0
    assert [bleu_tokenizer(code) for code in ("zh", "de", "deu_Latn", "ja", "kor_Hang")] == [
        "zh", "13a", "13a", "ja-mecab", "ko-mecab",
    ]  # fmt: skip


def test_averages_by_direction_into_and_out_of_the_pivot():
    directions = {
        pair: {"bleu": value, "chrf++": 2 * value}
        for pair, value in {"en-de": 10.0, "en-fr": 20.0, "de-en": 40.0, "de-fr": 2.0}.items()
    }
    found = averages(directions, "en")
    assert {group: values["bleu"] for group, values in found.items()} == {
        "all": 18.0,
        "one-to-many": 15.0,
        "many-to-one": 40.0,
    }
    assert found["all"]["chrf++"] == 36.0
    rows = score_rows({"directions": directions, "averages": found})
    assert rows[0] == {"direction": "en-de", "chrf++": 20.0, "bleu": 10.0} and len(rows) == 7


def test_order_and_batch_size_do_not_change_translations(toy, toy_model, toy_tokenizer):
    toy_model.train()
    sentences = [*toy.sentences(7, "test")["Pv"], "ba"]
    one_by_one = ns.translate(toy_model, toy_tokenizer, sentences, "Pv-Aa", batch_size=1, max_new_tokens=8)
    together = ns.translate(toy_model, toy_tokenizer, sentences, "Pv-Aa", batch_size=8, max_new_tokens=8)
    assert one_by_one == together and len(together) == 8
    assert toy_model.training, "the mode is given back"
    assert ns.translate(toy_model, toy_tokenizer, [], "Pv-Aa") == []


def test_limits_of_a_generation_config_hold(tmp_path):
    tokenizer, tokens = nllb(tmp_path)
    model = m2m_model(tokenizer)

    def longest(**options) -> int:
        return max(map(len, translate_tokens(model, tokenizer, TEXT, "en-de", language_tokens=tokens, **options)))

    assert longest(max_new_tokens=5) <= 5 < longest()
    assert longest(generation_config=GenerationConfig(max_new_tokens=5)) <= 5
    model.generation_config.max_new_tokens = 5
    assert longest() <= 5


def test_the_target_tag_is_forced(toy, toy_model, toy_tokenizer):
    calls = []
    generate = toy_model.generate
    toy_model.generate = lambda **kwargs: calls.append(kwargs) or generate(**kwargs)
    ns.translate(toy_model, toy_tokenizer, ["ba"], "Pv-Aa", num_beams=2, max_new_tokens=4)
    assert calls[0]["forced_bos_token_id"] == toy_tokenizer.convert_tokens_to_ids("Aa") and calls[0]["num_beams"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": -1}, "batch_size is a number of at least 1, got -1"),
        ({"num_beams": 0}, "num_beams is a number of at least 1, got 0"),
        ({"num_return_sequences": 2, "num_beams": 2}, "Each sentence gets one translation"),
        ({"generation_config": GenerationConfig(return_dict_in_generate=True)}, "Each sentence gets one translation"),
    ],
)
def test_options_without_one_translation_of_each_sentence_are_refused(options, message, toy_model, toy_tokenizer):
    with pytest.raises(ValueError, match=message):
        ns.translate(toy_model, toy_tokenizer, ["ba bu"], "Pv-Aa", **options)


def test_an_adapted_model_translates_under_its_pairs_and_tokens(toy, toy_data, toy_model, toy_tokenizer):
    counts = record_corpus(toy_model, toy_tokenizer, toy_data["validation"])
    config = ns.NeuronSpecializationConfig(
        masks=ns.CumulativeThreshold(0.3).select(counts),
        init_weights=False,
        language_token_ids=ns.language_token_ids(toy_tokenizer, {code: code for code in toy.languages}),
        task_type="SEQ_2_SEQ_LM",
    )
    adapted = get_peft_model(toy_model, config)
    sentences = toy.sentences(3, "test")["Pv"][:]
    german = ns.translate(adapted, toy_tokenizer, sentences, "Pv-Aa", max_new_tokens=8)
    with adapted.disable_adapter():
        base = ns.translate(adapted, toy_tokenizer, sentences, "Pv-Aa", max_new_tokens=8)
    assert german != base
    with pytest.raises(ValueError, match="Not a language token of the tokenizer: 'zz'"):
        ns.translate(adapted, toy_tokenizer, sentences, "Pv-zz")
    with pytest.raises(ValueError, match="language token of the tokenizer: 'zz'"):
        ns.translate(adapted, toy_tokenizer, [], "Pv-zz")
    with pytest.raises(ValueError, match="list of sentences, got one string"):
        ns.translate(adapted, toy_tokenizer, "one", "Pv-Aa")


def test_sentences_longer_than_the_model_are_named_truncated_or_split(toy_model, toy_tokenizer):
    sentences = ["ba bu", "bababu " * 20 + "bu " + "babu " * 60, "bu"]
    with pytest.raises(
        ValueError, match="^Sentence 12 of Pv-Aa, counting .* tokens, but the model has positions for 64: 'bababu "
    ):
        ns.translate(toy_model, toy_tokenizer, sentences, "Pv-Aa", numbers=[11, 12, 14])
    with pytest.raises(ValueError, match="error, truncate or split, got 'cut'"):
        ns.translate(toy_model, toy_tokenizer, sentences, "Pv-Aa", long_sentences="cut")

    def pieces(how: str) -> list[str]:
        """Return the pieces that the encoder saw of the long sentence, which lines up with its neighbors."""
        rows = []
        hook = toy_model.get_encoder().register_forward_pre_hook(
            lambda module, args, kwargs: rows.extend(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        options = {"batch_size": 1, "max_new_tokens": 4}
        (long,) = ns.translate(toy_model, toy_tokenizer, sentences[1:2], "Pv-Aa", long_sentences=how, **options)
        hook.remove()
        assert all(len(row) <= 64 and row[0] == toy_tokenizer.convert_tokens_to_ids("Pv") for row in rows)
        first, middle, last = ns.translate(toy_model, toy_tokenizer, sentences, "Pv-Aa", long_sentences=how, **options)
        assert middle == long
        assert [first, last] == ns.translate(toy_model, toy_tokenizer, sentences[::2], "Pv-Aa", **options)
        texts = toy_tokenizer.batch_decode(rows, skip_special_tokens=True)
        parts = ns.translate(toy_model, toy_tokenizer, texts, "Pv-Aa", **options)
        assert sorted(" ".join(parts).split()) == sorted(long.split())
        return texts

    assert len(pieces("truncate")) == 1
    split = pieces("split")
    assert len(split) > 2 and sum(text.count("bu") for text in split) == sentences[1].count("bu"), "nothing is lost"


def test_a_progress_bar_counts_sentences_whatever_their_pieces(toy_model, toy_tokenizer):
    sentences = ["ba", "babu " * 150, "bu", "bi " * 99]
    options = {"long_sentences": "split", "batch_size": 1, "max_new_tokens": 2}
    with tqdm(total=4, file=io.StringIO()) as bar:
        ns.translate(toy_model, toy_tokenizer, sentences, "Pv-Aa", progress=bar, **options)
        assert bar.n == 4


@pytest.mark.parametrize("how", ["truncate", "split", "error"])
def test_what_is_too_long_is_said_once_and_by_us(toy_model, toy_checkpoint, how, caplog):
    """The tokenizer knows a limit too, and warns that the model will fail, which it does not."""
    tokenizer = AutoTokenizer.from_pretrained(toy_checkpoint)  # a new one, because each warns once
    refused = pytest.raises(ValueError, match="positions for 64") if how == "error" else nullcontext()
    with transformers_logs(caplog), refused:
        ns.translate(toy_model, tokenizer, ["babu " * 99], "Pv-Aa", long_sentences=how, num_beams=1)
    assert [record.message for record in caplog.records] == []


def test_evaluate_refuses_long_sentences_before_it_translates(toy_model, toy_tokenizer):
    short = {"source": ["ba", "bu"], "target": ["ba", "bu"]}
    data = {"Pv-Aa": Dataset.from_dict(short), "Aa-Pv": Dataset.from_dict({**short, "source": ["ba", "babu " * 99]})}
    toy_model.generate = None  # must not be reached
    with pytest.raises(ValueError, match="^Sentence 2 of Aa-Pv, "):
        evaluate(toy_model, toy_tokenizer, data)
    del toy_model.generate
    result = evaluate(toy_model, toy_tokenizer, data, long_sentences="split", num_beams=1, max_new_tokens=3)
    assert len(result["translations"]["Aa-Pv"]) == 2


@pytest.mark.parametrize(
    ("text", "halves"),
    [
        ("One, two, three. Four five", ("One, two, three.", "Four five")),
        ("one, two three four five six", ("one,", "two three four five six")),
        ("one two three four", ("one two", "three four")),
        ("第一句。第二句，还有更多", ("第一句。", "第二句，还有更多")),
        ("abcdef", ("abc", "def")),
        ("Ends with a stop.", ("Ends with", "a stop.")),
    ],
)
def test_text_is_split_where_it_hurts_least(text, halves):
    assert _halves(text) == halves


def test_pieces_are_joined_as_the_language_writes():
    assert join_pieces(["a", "b"], "deu_Latn") == "a b" and join_pieces(["一", "二"], "zho_Hans") == "一二"


def test_evaluate_compares_with_whole_references(toy_data, toy_model, toy_tokenizer):
    data = {pair: rows.select(range(3)) for pair, rows in toy_data["test"].items()}
    result = evaluate(toy_model, toy_tokenizer, data, pivot="Pv", num_beams=1, max_new_tokens=4)
    assert set(result["directions"]) == set(data) and set(result["averages"]) == {"all", "one-to-many", "many-to-one"}
    for pair, rows in data.items():
        assert len(result["translations"][pair]) == 3
        again = score(result["translations"][pair], rows["target"][:], "Aa")
        assert result["directions"][pair]["chrf++"] == again["chrf++"]


def test_recording_parts_adds_up_to_the_whole(toy_data, toy_model, toy_tokenizer):
    model = toy_model.double()
    whole = record_corpus(model, toy_tokenizer, toy_data["validation"])
    parts = record_corpus_parts(model, toy_tokenizer, toy_data["validation"], parts=4, batch_size=7)
    total = parts[0].merge(*parts[1:])
    assert all(total.counts[name].equal(count) for name, count in whole.counts.items())
    found = stability(parts, ns.CumulativeThreshold(0.9))
    assert [step["share"] for step in found["growing"]] == [0.25, 0.5, 0.75, 1.0]
    assert all(iou == 1 for iou in found["growing"][-1]["iou"].values())
    assert all(0 < iou <= 1 for iou in found["halves"].values())
    with pytest.raises(ValueError, match="two or more"):
        stability(parts[:1], ns.CumulativeThreshold(0.9))
    with pytest.raises(ValueError, match="cannot be split into 99 parts"):
        record_corpus_parts(model, toy_tokenizer, toy_data["validation"], parts=99)


def test_unstable_masks_are_named():
    a = counts_of({"encoder.0": [[9, 9, 0, 0]]}, ["en-de"])
    b = counts_of({"encoder.0": [[0, 0, 9, 9]]}, ["en-de"])
    found = stability([a, b], ns.CumulativeThreshold(0.9))
    assert found["unstable"] == ["en-de"] and found["halves"] == {"en-de": 0}
    assert stability([a, a], ns.CumulativeThreshold(0.9))["unstable"] == []


def test_missing_segmenters_are_named_before_anything_is_translated(toy_data, toy_tokenizer, monkeypatch):
    for module in ("MeCab", "mecab_ko"):
        monkeypatch.setitem(sys.modules, module, None)  # cannot be imported, installed or not
    for module in ("ja_mecab", "ko_mecab"):
        monkeypatch.delitem(sys.modules, f"sacrebleu.tokenizers.tokenizer_{module}", raising=False)
    data = {"Pv-ja": next(iter(toy_data["test"].values()))}
    with pytest.raises(ImportError, match=r"into 'ja' needs .*ja-mecab.*neuron-specialization\[ja\]"):
        evaluate(None, toy_tokenizer, data)  # a model that cannot translate
    with pytest.raises(ImportError, match=r"neuron-specialization\[ko\]"):
        check_scorers(["de", "kor_Hang"])
    check_scorers(["de", "zho_Hans", "tha_Thai"])


def test_what_holds_no_sentences_is_refused_and_a_generator_will_do(toy_model, toy_tokenizer, tmp_path):
    sentences = ["ba bu", "bi"]
    listed = ns.translate(toy_model, toy_tokenizer, sentences, "Pv-Aa", max_new_tokens=4)
    assert ns.translate(toy_model, toy_tokenizer, (s for s in sentences), "Pv-Aa", max_new_tokens=4) == listed
    for wrong, message in ((tmp_path, "list of sentences, got"), (3, "got 3"), (["ba", None], "None at position 1")):
        with pytest.raises(ValueError, match=message):
            ns.translate(toy_model, toy_tokenizer, wrong, "Pv-Aa")


def test_evaluation_shows_one_bar(toy_data, toy_model, toy_tokenizer, capsys):
    data = {pair: rows.select(range(9)) for pair, rows in toy_data["test"].items()}
    evaluate(toy_model, toy_tokenizer, data, num_beams=1, max_new_tokens=2, batch_size=2)
    printed = capsys.readouterr().err
    assert f"{9 * len(data)}/{9 * len(data)}" in printed and printed.count("\n") == 1


def test_recording_shows_one_bar(toy_data, toy_model, toy_tokenizer, capsys):
    for parts, batches in ((1, 32), (3, 36)):
        record_corpus_parts(toy_model, toy_tokenizer, toy_data["validation"], parts=parts, batch_size=5)
        printed = capsys.readouterr().err
        assert len(toy_data["validation"]) > 2 and printed.count(" 0%|") == 1 and f"/{batches} " in printed


def test_losses_need_positions_for_both_sides_unless_they_grow():
    """Nothing is truncated for a loss, and a learned table ends with an IndexError, after all of the training."""
    sizes = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    learned = MBartForConditionalGeneration(MBartConfig(**sizes, decoder_attention_heads=2, max_position_embeddings=8))
    encoded = {"input_ids": [[5] * 8], "labels": [[5] * 9]}
    with pytest.raises(ValueError, match="The target of sentence pair 1 of en-de has 9 tokens.*positions for 8"):
        check_positions(learned, "en-de", encoded)
    check_positions(make_m2m100(max_position_embeddings=8), "en-de", encoded)
