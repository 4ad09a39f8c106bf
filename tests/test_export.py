"""A pair as a smaller plain model, in memory and as a checkpoint."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5Model

import neuron_specialization as ns
from neuron_specialization.export.compaction import save_compact
from neuron_specialization.export.ctranslate2 import load_ctranslate2, save_ctranslate2, translate_ctranslate2
from neuron_specialization.export.vocabulary import trim_vocabulary, unknown_rate
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.tokenization import encode
from neuron_specialization.translation.translate import text_of, translate_tokens

from . import architectures
from .conftest import PAIRS, make_batch, make_m2m100, make_masks, make_t5
from .test_conventions import CONVENTIONS, TEXT, m2m100, m2m_model, madlad, mbart25, mbart50, mbart_model, nllb, t5

MODELS = {"plain": make_m2m100, "gated": make_t5, "t5": lambda: make_t5("relu")}
INPUTS = {key: make_batch()[key] for key in ("input_ids", "attention_mask")} | {"max_new_tokens": 8, "num_beams": 3}


def adapted(make=make_m2m100, **config):
    model = make()
    settings = {"masks": make_masks(model), "init_weights": False, "task_type": "SEQ_2_SEQ_LM", **config}
    return get_peft_model(model, ns.NeuronSpecializationConfig(**settings)).eval()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mode", ["none", "delta", "low_rank", "full"])
@pytest.mark.parametrize("mask_bias", [False, True])
def test_a_compact_model_is_plain_smaller_and_computes_the_same(make, mode, mask_bias):
    model = adapted(make, trainable=mode, mask_bias=mask_bias).double()
    batch = make_batch(pad=model.config.pad_token_id)
    expected = model(**batch, language_pairs="en-fr").logits
    small = ns.compact(model, "en-fr")
    torch.testing.assert_close(small(**batch).logits, expected, rtol=1e-9, atol=1e-10)
    assert type(small) is type(model.get_base_model())
    assert not any("neuron_specialization" in type(module).__module__ for module in small.modules())
    assert "generate" not in vars(small) and not hasattr(small, "peft_config")
    masks = model.peft_config["default"].masks
    assert {b.name: b.d_ff for b in ns.find_ffn_blocks(small)} == {
        name: int(masks.row("en-fr", name).sum()) for name in masks.rows
    }
    assert small.generate(**INPUTS).equal(model.generate(**INPUTS, language_pairs="en-fr"))
    assert model(**batch, language_pairs="en-fr").logits.equal(expected), "the adapted model is left as it was"
    small(**batch).loss.backward()  # and it trains on as any model


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_checkpoint_is_loaded_by_transformers(make, tmp_path):
    model = adapted(make)
    settings = model.get_base_model().generation_config
    settings.num_beams, settings.max_length = 3, 11
    inputs = {key: INPUTS[key] for key in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, language_pairs="de-en")
    saved = save_compact(ns.compact(model, "de-en"), tmp_path / "checkpoint")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint")
    assert loaded.generate(**inputs).equal(expected), "with the generation config beside it"
    batch = make_batch(pad=model.config.pad_token_id)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch, language_pairs="de-en").logits)
    assert saved.num_parameters() < make().num_parameters()
    widest = {b.stack: b.d_ff for b in ns.find_ffn_blocks(loaded)}
    masks = model.peft_config["default"].masks
    for stack, width in widest.items():
        kept = [int(masks.row("de-en", name).sum()) for name in masks.rows if masks.stacks[name] == stack]
        assert width == max(kept) or make is not make_m2m100 and width >= max(kept)  # T5 has one width for both


def test_checkpoints_are_loaded_without_this_package(tmp_path):
    for name, make in MODELS.items():
        save_compact(ns.compact(adapted(make), "de-en"), tmp_path / name)
    code = (
        "import sys; from transformers import AutoModelForSeq2SeqLM as A;"
        f"[A.from_pretrained({str(tmp_path)!r} + '/' + name) for name in {list(MODELS)}];"
        "assert not any(m.startswith(('neuron_specialization', 'peft')) for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_loaded_adapter_and_composed_pairs_can_be_cut(tmp_path):
    model = adapted(trainable="delta")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_m2m100(), str(tmp_path)).eval()
    small = ns.compact(loaded, "de-fr")
    torch.testing.assert_close(small(**make_batch()).logits, model(**make_batch(), language_pairs="de-fr").logits)


def test_what_cannot_be_cut_says_why():
    model = adapted()
    with pytest.raises(ValueError, match="no language pair 'en-it'"):
        ns.compact(model, "en-it")
    with pytest.raises(ValueError, match="no language pair 'en-it'"):
        ns.compact(adapted(default_pair="base"), "en-it")
    with pytest.raises(ValueError, match="no neuron specialization adapter"):
        ns.compact(make_m2m100(), "en-de")
    model.add_adapter("second", ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100())))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="several adapters are active"):
        ns.compact(model, "en-de")
    model.set_adapter("default")
    model.set_language_pair("en-de")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged or disabled; unmerge it"):
        ns.compact(model, "en-de")
    config = ns.NeuronSpecializationConfig(target_modules=["q_proj"], language_pairs=PAIRS, task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="q_proj cannot be cut.*no FFN block"):
        ns.compact(get_peft_model(make_m2m100(), config), "en-de")


def test_a_pair_that_only_an_inactive_adapter_knows_is_refused():
    config = {"trainable": "none", "task_type": "SEQ_2_SEQ_LM"}
    first = ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100()), default_pair="en-de", **config)
    model = get_peft_model(make_m2m100(), first)
    others = make_masks(make_m2m100(), ["en-xx", "xx-en"])
    model.add_adapter("other", ns.NeuronSpecializationConfig(masks=others, **config))
    with pytest.raises(ValueError, match="'en-xx'"):
        ns.compact(model, "en-xx")
    model.set_adapter("other")
    widths = {block.name: block.d_ff for block in ns.find_ffn_blocks(ns.compact(model, "en-xx"))}
    assert widths == {name: int(others.row("en-xx", name).sum()) for name in others.rows}


def test_ragged_models_convert_to_ctranslate2(toy, toy_model, toy_tokenizer, toy_data, tmp_path):
    pytest.importorskip("ctranslate2")
    counts = record_corpus(toy_model, toy_tokenizer, toy_data["validation"])
    masks = ns.CumulativeThreshold(0.4).select(counts)
    config = ns.NeuronSpecializationConfig(masks=masks, init_weights=False, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(toy_model, config).eval()
    small = ns.compact(model, "Pv-Aa")
    assert len({b.d_ff for b in ns.find_ffn_blocks(small)}) > 1, "ragged"
    save_ctranslate2(small, toy_tokenizer, tmp_path / "float32")
    of_torch = torch.get_num_threads()
    translator = load_ctranslate2(tmp_path / "float32", threads=of_torch + 1)
    assert torch.get_num_threads() == of_torch
    sentences = toy.sentences(12, "ct2")["Pv"][:]
    encoded = encode(toy_tokenizer, "Pv-Aa", sentences, None, {"Pv": "Pv", "Aa": "Aa"})["input_ids"]
    found = translate_ctranslate2(translator, toy_tokenizer, encoded, "Aa", num_beams=2, max_length=10)
    options = {"num_beams": 2, "max_new_tokens": 10}
    assert found == translate_tokens(model, toy_tokenizer, sentences, "Pv-Aa", **options)
    assert text_of(toy_tokenizer, found) == ns.translate(model, toy_tokenizer, sentences, "Pv-Aa", **options)
    with pytest.raises(ValueError, match="quantization must be one of"):
        save_ctranslate2(small, toy_tokenizer, tmp_path / "x", "int3")
    with pytest.raises(ValueError, match="CTranslate2 cannot convert a FSMT"):
        save_ctranslate2(architectures.make("fsmt"), toy_tokenizer, tmp_path / "x")


@pytest.mark.parametrize("quantization", ["int8", "int16"])
def test_a_model_is_left_as_it_is_by_its_conversion(quantization, tmp_path):
    """CTranslate2 rounds weights in place."""
    pytest.importorskip("ctranslate2")
    tokenizer, _ = nllb(tmp_path)
    model = m2m_model(tokenizer)
    before = copy.deepcopy(model.state_dict())
    for name in ("first", "second"):
        save_ctranslate2(model, tokenizer, tmp_path / name, quantization)
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert (tmp_path / "first" / "model.bin").read_bytes() == (tmp_path / "second" / "model.bin").read_bytes()


def test_a_checkpoint_is_not_written_beside_an_adapter(tmp_path):
    """transformers would load the adapter onto it."""
    model = adapted()
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="holds an adapter; choose another directory"):
        save_compact(ns.compact(model, "de-en"), tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("family", ["t5", "t5 v1.1", "mt5"])
def test_the_t5_family_scales_its_output_in_ctranslate2_as_in_transformers(family, tmp_path):
    pytest.importorskip("ctranslate2")
    tokenizer, tokens = madlad(tmp_path)
    sizes = {"d_model": 64, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    special = {"pad_token_id": 3, "decoder_start_token_id": 3, "eos_token_id": tokenizer.eos_token_id}
    tied = {} if family == "t5" else {"tie_word_embeddings": False}
    config_class, model_class = (MT5Config, MT5ForConditionalGeneration) if family == "mt5" else (T5Config, T5Model)
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, **special, **tied)).eval()
    options = {"language_tokens": tokens, "source_tag": "target", "num_beams": 4, "max_length": 12}
    expected = translate_tokens(model, tokenizer, TEXT, "en-de", **options)
    save_ctranslate2(model, tokenizer, tmp_path / "float32")
    translator = load_ctranslate2(tmp_path / "float32", threads=1)
    encoded = encode(tokenizer, "en-de", TEXT, None, tokens, "target")["input_ids"]
    found = translate_ctranslate2(translator, tokenizer, encoded, num_beams=4, max_length=11)
    assert found == expected and model.config.tie_word_embeddings


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_translates_in_ctranslate2_as_in_transformers(convention, tmp_path):
    """mBART-25's decoder starts with the target's tag, mBART-50's with the end token and then the tag."""
    pytest.importorskip("ctranslate2")
    make_tokenizer, make_model, source_tag = CONVENTIONS[convention]
    tokenizer, tokens = make_tokenizer(tmp_path)
    torch.manual_seed(0)
    model = make_model(tokenizer)
    before = copy.deepcopy(vars(model.config))
    options = {"language_tokens": tokens, "source_tag": source_tag, "num_beams": 3, "max_length": 14}
    expected = translate_tokens(model, tokenizer, TEXT, "en-de", **options)
    save_ctranslate2(model, tokenizer, tmp_path / "float32")
    if convention.startswith("mbart"):
        assert vars(model.config) == before
    translator = load_ctranslate2(tmp_path / "float32", threads=1)
    encoded = encode(tokenizer, "en-de", TEXT, None, tokens, source_tag)["input_ids"]
    target = tokens["de"] if source_tag == "source" else None
    assert translate_ctranslate2(translator, tokenizer, encoded, target, num_beams=3, max_length=13) == expected


def test_modules_trained_beside_the_masks_are_exported():
    model = make_m2m100()
    config = ns.NeuronSpecializationConfig(
        masks=make_masks(model), modules_to_save=["layer_norm"], trainable_token_indices=[5], task_type="SEQ_2_SEQ_LM"
    )
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.rand_like(parameter))
        expected = adapted(**make_batch(), language_pairs="en-de").logits
        small = ns.compact(adapted, "en-de")
        torch.testing.assert_close(small(**make_batch()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any("modules_to_save" in name or "original_module" in name for name in small.state_dict())


def test_a_trimmed_vocabulary_computes_the_same_for_its_own_text(toy_model, toy_tokenizer, toy_data, tmp_path):
    pytest.importorskip("ctranslate2")
    counts = record_corpus(toy_model, toy_tokenizer, toy_data["validation"])
    config = ns.NeuronSpecializationConfig(
        masks=ns.CumulativeThreshold(0.5).select(counts), init_weights=False, task_type="SEQ_2_SEQ_LM"
    )
    small = ns.compact(get_peft_model(toy_model, config).eval(), "Pv-Aa")
    text = [s for side in ("source", "target") for s in toy_data["train"]["Pv-Aa"][side]]
    trimmed, tokenizer, cut = trim_vocabulary(small, toy_tokenizer, text, ["Pv", "Aa"])
    assert cut.after < cut.before == len(toy_tokenizer) and len(tokenizer) == cut.after
    assert "Ba" not in tokenizer.get_vocab() and trimmed.config.vocab_size == cut.after
    assert trimmed.num_parameters() == small.num_parameters() - (cut.before - cut.after) * 32
    save_compact(trimmed, tmp_path / "trimmed", tokenizer)
    loaded, reloaded = load_checkpoint(str(tmp_path / "trimmed"))
    sentences = toy_data["train"]["Pv-Aa"]["source"][:20]
    assert ns.translate(loaded, reloaded, sentences, "Pv-Aa") == ns.translate(trimmed, tokenizer, sentences, "Pv-Aa")
    save_ctranslate2(trimmed, reloaded, tmp_path / "ctranslate2")
    translator = load_ctranslate2(tmp_path / "ctranslate2", threads=1)
    encoded = encode(reloaded, "Pv-Aa", sentences, None, {"Pv": "Pv", "Aa": "Aa"})["input_ids"]
    found = translate_ctranslate2(translator, reloaded, encoded, "Aa", num_beams=2, max_length=10)
    assert found == translate_tokens(loaded, reloaded, sentences, "Pv-Aa", num_beams=2, max_new_tokens=10)
    assert unknown_rate(toy_tokenizer, tokenizer, sentences) == 0
    other = toy_data["train"]["Pv-Ba"]["target"][:20]
    assert 0.05 < unknown_rate(toy_tokenizer, tokenizer, other) <= 1
    # the logits of the kept tokens are untouched
    toy_tokenizer.src_lang, toy_tokenizer.tgt_lang = "Pv", "Aa"
    tokenizer.src_lang, tokenizer.tgt_lang = "Pv", "Aa"
    old = toy_tokenizer(sentences[:1], text_target=sentences[:1], return_tensors="pt")
    new = tokenizer(sentences[:1], text_target=sentences[:1], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(trimmed(**new).logits, small(**old).logits[..., cut.ids])


def test_every_merge_of_a_token_stays(tmp_path):
    """As in tokenizers made from sentencepiece: "abc" comes of "ab" + "c" in one text, of "a" + "bc" in another."""
    merges = [("b", "c"), ("c", "d"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("e", "f")]
    words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdef", *("".join(merge) for merge in merges if merge != ("a", "bc"))]
    model = BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>")
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **names)
    base = make_m2m100()
    base.generation_config.suppress_tokens = [9, 15]  # "f" and "ef"
    base.generation_config.bad_words_ids = [[4, 5], [15]]
    trimmed, smaller, cut = trim_vocabulary(base, tokenizer, ["abcd", "cd"], ["<s>"])
    assert smaller.tokenize("abcd") == tokenizer.tokenize("abcd") == ["abc", "d"]
    assert "ef" not in smaller.get_vocab() and smaller.tokenize("ef") == ["e", "f"], "falls back to characters"
    assert [cut.ids[i] for i in trimmed.generation_config.suppress_tokens] == [9]
    assert [[cut.ids[i] for i in ids] for ids in trimmed.generation_config.bad_words_ids] == [[4, 5]]


@pytest.mark.parametrize("affixes", [{"end_of_word_suffix": "</w>"}, {"continuing_subword_prefix": "##"}])
def test_characters_with_marks_of_their_place_in_the_word_stay(affixes):
    """Words of BPE tokenizers such as FSMT's end in "d</w>", which is a character as "d" is."""
    suffix, prefix = affixes.get("end_of_word_suffix", ""), affixes.get("continuing_subword_prefix", "")
    characters = [*"abcd", *(f"{prefix}{c}{suffix}" for c in "abcd")]
    merges = [("a", f"{prefix}b{suffix}"), ("c", f"{prefix}d{suffix}")]
    words = ["<s>", "<pad>", "</s>", "<unk>", *characters, f"ab{suffix}", f"cd{suffix}"]
    model = BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", **affixes)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **names)
    assert tokenizer.tokenize("cd") == [f"cd{suffix}"]
    _, smaller, _ = trim_vocabulary(make_m2m100(), tokenizer, ["ab"], ["<s>"])
    assert smaller.tokenize("ab") == [f"ab{suffix}"]
    assert smaller.tokenize("cd") == ["c", f"{prefix}d{suffix}"] and f"cd{suffix}" not in smaller.get_vocab()


def test_tokenizers_that_cannot_be_trimmed_are_refused(tmp_path):
    tokenizer, _ = m2m100(tmp_path)
    with pytest.raises(ValueError, match="Only BPE and Unigram tokenizers.*M2M100Tokenizer"):
        trim_vocabulary(make_m2m100(), tokenizer, ["text"], ["__en__"])


def test_a_vocabulary_is_trimmed_to_some_text_and_tags_of_its_own(tmp_path):
    tokenizer, _ = nllb(tmp_path)
    model = m2m_model(tokenizer)
    with pytest.raises(ValueError, match="takes text and language tokens"):
        trim_vocabulary(model, tokenizer, [], ["eng_Latn", "deu_Latn"])
    with pytest.raises(ValueError, match="Not a language token .*'de'"):
        trim_vocabulary(model, tokenizer, TEXT[:2], ["eng_Latn", "de"])


def test_unknown_characters_stay_unknown_in_a_trimmed_t5(tmp_path):
    tokenizer, tokens = madlad(tmp_path)
    text = [*TEXT[:2], "die 日 katze"]
    _, smaller, cut = trim_vocabulary(t5(tokenizer), tokenizer, text, [tokens["en"], tokens["de"]])
    assert cut.after < cut.before
    assert cut.ids[smaller(text[2], return_tensors="pt").input_ids].equal(
        tokenizer(text[2], return_tensors="pt").input_ids
    )


def test_sentences_that_name_another_language_are_refused(tmp_path):
    tokenizer, tokens = nllb(tmp_path)
    with pytest.raises(ValueError, match="would cut 'fra_Latn is a tag' .* Leave the sentence out"):
        trim_vocabulary(m2m_model(tokenizer), tokenizer, [*TEXT[:2], "fra_Latn is a tag"], ["eng_Latn", "deu_Latn"])


@pytest.mark.parametrize("make", [mbart25, mbart50])
def test_unigram_vocabularies_are_trimmed_too(make, tmp_path):
    tokenizer, tokens = make(tmp_path)
    model = mbart_model(tokenizer)
    trimmed, smaller, cut = trim_vocabulary(model, tokenizer, TEXT[:2], [tokens["en"], tokens["de"]])
    assert cut.after < cut.before
    for t in (tokenizer, smaller):
        t.src_lang, t.tgt_lang = tokens["en"], tokens["de"]
    old = tokenizer(TEXT[:1], text_target=TEXT[1:2], return_tensors="pt")
    new = smaller(TEXT[:1], text_target=TEXT[1:2], return_tensors="pt")
    assert cut.ids[new["input_ids"]].equal(old["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(trimmed(**new).logits, model(**old).logits[..., cut.ids])
