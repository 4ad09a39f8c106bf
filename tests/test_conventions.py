"""Tagging conventions end to end: each model's own tokenizer, the collator, routing without being told."""

import json

import pytest
import sentencepiece
import torch
import transformers as tf
from datasets import Dataset
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.adapter.call import innermost_call
from neuron_specialization.adapter.routing import router_of
from neuron_specialization.translation.batching import TranslationCollator
from neuron_specialization.translation.encoding import encode_parallel
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.tokenization import resolve_tokens, train_tokenizer
from neuron_specialization.translation.training import SpecializationTrainingArguments, fit
from neuron_specialization.translation.translate import translate_tokens

TEXT = ["the cat sits here", "die katze sitzt hier", "le chat est assis", "a dog runs fast", "ein hund rennt schnell"]
CORPUS = {"en-de": (TEXT[:1] + TEXT[3:4], TEXT[1:2] + TEXT[4:]), "de-en": (TEXT[1:2], TEXT[:1])}
CORPUS["en-fr"] = (TEXT[:1], TEXT[2:3])


def sentencepiece_model(directory, **options) -> str:
    (directory / "text").write_text("\n".join(TEXT * 20))
    prefix = str(directory / "spm")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=prefix,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return prefix + ".model"


def pieces(path: str) -> list[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def nllb(directory, legacy=False):
    tokenizer = train_tokenizer(TEXT, ["eng_Latn", "deu_Latn", "fra_Latn"], 120)
    if legacy:
        tokenizer.legacy_behaviour = True
    return tokenizer, {"en": "eng_Latn", "de": "deu_Latn", "fr": "fra_Latn"}


def m2m100(directory):
    path = sentencepiece_model(directory)
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *(p for p in pieces(path) if p not in ("<s>", "</s>", "<unk>"))]
    (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    tokenizer = tf.M2M100Tokenizer(str(directory / "vocab.json"), path, src_lang="en", tgt_lang="de")
    return tokenizer, {code: f"__{code}__" for code in ("en", "de", "fr")}


def unigram(directory):
    path = sentencepiece_model(directory)
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    scored = [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    return [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored]


def mbart25(directory):
    tokenizer = tf.MBartTokenizer(vocab=unigram(directory), src_lang="en_XX", tgt_lang="de_DE")
    return tokenizer, {"en": "en_XX", "de": "de_DE", "fr": "fr_XX"}


def mbart50(directory):
    tokenizer = tf.MBart50Tokenizer(vocab=unigram(directory), src_lang="en_XX", tgt_lang="de_DE")
    return tokenizer, {"en": "en_XX", "de": "de_DE", "fr": "fr_XX"}


def marian(directory):
    path = sentencepiece_model(directory)
    tags = [f">>{code}<<" for code in ("eng", "deu", "fra")]
    vocabulary = ["</s>", "<unk>", *tags, *(p for p in pieces(path) if p not in ("<s>", "</s>", "<unk>")), "<pad>"]
    (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    tokenizer = tf.MarianTokenizer(path, path, str(directory / "vocab.json"))
    return tokenizer, dict(zip(("en", "de", "fr"), tags, strict=True))


def madlad(directory):
    path = sentencepiece_model(directory, user_defined_symbols=["<2en>", "<2de>", "<2fr>"], pad_id=3)
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer = tf.T5Tokenizer(vocab=vocabulary, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return tokenizer, {code: f"<2{code}>" for code in ("en", "de", "fr")}


def test_a_marian_out_of_one_language_has_tags_of_the_others_only(tmp_path):
    tokenizer, tokens = marian(tmp_path)
    tokenizer.encoder.pop(tokens["en"])
    model = marian_model(tokenizer)
    corpus = {"en-de": Dataset.from_dict({"source": TEXT[:1], "target": TEXT[1:2]})}
    options = {"language_tokens": {"de": tokens["de"]}, "source_tag": "target"}
    counts = record_corpus(model, tokenizer, corpus, **options)
    assert counts.language_token_ids == {"de": tokenizer.convert_tokens_to_ids(tokens["de"])}
    with pytest.raises(ValueError, match="Not a language token .*'en' for 'en'"):
        ns.translate(model, tokenizer, TEXT[1:2], "de-en", **options)
    masks = ns.CumulativeThreshold(0.5).select(counts)
    config = ns.NeuronSpecializationConfig(masks=masks, source_tag="target", task_type="SEQ_2_SEQ_LM")
    assert len(ns.translate(get_peft_model(model, config), tokenizer, TEXT[:1], "en-de", max_new_tokens=3)) == 1


@pytest.mark.parametrize("convention", ["mbart25", "mbart50", "marian"])
def test_translations_end_where_positions_do(convention, tmp_path):
    """Without a limit of its own, a search would go on to twice the source's length: an error of the embedding."""
    make_tokenizer, make_model, source_tag = CONVENTIONS[convention]
    torch.manual_seed(0)
    tokenizer, tokens = make_tokenizer(tmp_path)
    model = make_model(tokenizer)
    model.generation_config.max_length = model.generation_config.eos_token_id = None
    sentence = " ".join([TEXT[0]] * 3)
    options = {"language_tokens": tokens, "source_tag": source_tag, "num_beams": 1}
    (tokens_of,) = translate_tokens(model, tokenizer, [sentence], "en-de", **options)
    assert 0 < len(tokens_of) < 64


def test_text_longer_than_the_models_positions_is_truncated(tmp_path):
    """Positions are learned here: more than there are is an error of the embedding."""
    tokenizer, tokens = mbart50(tmp_path)
    model = bart_like(tf.MBartConfig, tf.MBartForConditionalGeneration, tokenizer)
    data = {"en-de": Dataset.from_dict({"source": [TEXT[0] * 20], "target": [TEXT[1] * 20]})}
    counts = record_corpus(model, tokenizer, data, language_tokens=tokens)
    assert {stack: count.tolist() for stack, count in counts.tokens.items()} == {"encoder": [64], "decoder": [64]}
    args = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    training = SpecializationTrainingArguments(str(tmp_path / "run"), **args)
    assert fit(model, tokenizer, data, data, training, language_tokens=tokens)["best_validation_loss"] > 0


def vocabulary_size(tokenizer) -> int:
    """M2M100's tags have ids beyond those it counts."""
    return max([len(tokenizer) - 1, *getattr(tokenizer, "id_to_lang_token", {})]) + 1


def bart_like(config_class, model_class, tokenizer):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    start = tokenizer.pad_token_id if model_class is tf.MarianMTModel else tokenizer.eos_token_id
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "forced_eos_token_id": None, "init_std": 0.3}
    config = config_class(
        vocab_size=vocabulary_size(tokenizer), decoder_start_token_id=start, **sizes, **heads, **special, **quiet
    )
    return model_class(config).eval()


def t5(tokenizer):
    config = tf.T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=20,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tf.T5ForConditionalGeneration(config).eval()


def m2m_model(tokenizer):
    return bart_like(tf.M2M100Config, tf.M2M100ForConditionalGeneration, tokenizer)


def mbart_model(tokenizer):
    return bart_like(tf.MBartConfig, tf.MBartForConditionalGeneration, tokenizer)


def marian_model(tokenizer):
    return bart_like(tf.MarianConfig, tf.MarianMTModel, tokenizer)


CONVENTIONS = {
    "nllb": (nllb, m2m_model, "source"),
    "nllb-legacy": (lambda directory: nllb(directory, legacy=True), m2m_model, "source"),
    "m2m100": (m2m100, m2m_model, "source"),
    "mbart25": (mbart25, mbart_model, "source"),
    "mbart50": (mbart50, mbart_model, "source"),
    "marian": (marian, marian_model, "target"),
    "madlad": (madlad, t5, "target"),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_from_text_to_translation(convention, tmp_path):
    make_tokenizer, make_model, source_tag = CONVENTIONS[convention]
    torch.manual_seed(0)
    tokenizer, tokens = make_tokenizer(tmp_path)
    model = make_model(tokenizer)
    corpus = {p: Dataset.from_dict({"source": s, "target": t}) for p, (s, t) in CORPUS.items()}
    options = {"language_tokens": tokens, "source_tag": source_tag}
    counts = record_corpus(model, tokenizer, corpus, **options)
    ids = ns.language_token_ids(tokenizer, tokens)
    config = ns.NeuronSpecializationConfig(
        masks=ns.CumulativeThreshold(0.5).select(counts),
        init_weights=False,
        language_token_ids=ids,
        source_tag=source_tag,
        task_type="SEQ_2_SEQ_LM",
    )
    adapted = get_peft_model(model, config).eval()

    encoded = encode_parallel(corpus, tokenizer, resolve_tokens(tokenizer, corpus, tokens), source_tag=source_tag)
    pairs = [list(corpus)[i] for i in encoded["language_pair"]]
    batch = TranslationCollator(tokenizer, model)(list(encoded))
    for row, pair in zip(batch["input_ids"], pairs, strict=True):
        source, target = pair.split("-")
        tag = ids[target if source_tag == "target" else source]
        assert [i for i in row.tolist() if i in ids.values()] == [tag], tokenizer.convert_ids_to_tokens(row)
    with torch.no_grad():
        told = adapted(**batch, language_pairs=pairs).logits
        assert adapted(**batch).logits.equal(told)
        assert not torch.allclose(adapted(**batch, language_pairs=pairs[::-1]).logits, told)

    # the tags that translate() gives `generate` lead it to the pair's rows, from the first encoder call
    router = router_of(adapted)
    for pair in corpus:
        translated = ns.translate(adapted, tokenizer, TEXT[:1], pair, max_new_tokens=5)
        expected = router.resolvers["default"].route(pair)
        assert not any(token in translated[0] for token in tokens.values()), "tags are no text"
        calls = []
        generate = type(model).generate

        def read(self, *args, calls=calls, generate=generate, **kwargs):
            calls.append([rows.index.tolist() for rows in innermost_call(router).rows["default"]])
            return generate(self, *args, **kwargs)

        plain = _tags_only(adapted, tokenizer, TEXT[0], pair, tokens, source_tag)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "generate", read)
            expected_tokens = adapted.generate(**plain, max_new_tokens=3)
            plain = {"input_ids": plain["input_ids"]}
            assert adapted.generate(**plain, language_pairs=pair, max_new_tokens=3).equal(expected_tokens)
        assert calls == [[[expected[0]], [expected[1]]]] * 2, (convention, pair)


def _tags_only(model, tokenizer, sentence, pair, tokens, source_tag) -> dict:
    """What a user passes to `generate` who knows nothing of pairs."""
    from neuron_specialization.translation.tokenization import encode
    from neuron_specialization.translation.translate import _target_tag

    inputs = {"input_ids": torch.tensor(encode(tokenizer, pair, [sentence], None, tokens, source_tag)["input_ids"])}
    if source_tag == "source":
        inputs |= _target_tag(model.get_base_model(), tokenizer, pair, tokens)
    return inputs


def test_mbart25_starts_the_decoder_with_the_tag_and_the_others_generate_it(tmp_path):
    from neuron_specialization.translation.translate import _target_tag

    for convention, expected in (("mbart25", "decoder_start_token_id"), ("mbart50", "forced_bos_token_id")):
        make_tokenizer, make_model, _ = CONVENTIONS[convention]
        (tmp_path / convention).mkdir()
        tokenizer, tokens = make_tokenizer(tmp_path / convention)
        tag = _target_tag(make_model(tokenizer), tokenizer, "en-de", tokens)
        assert tag == {expected: tokenizer.convert_tokens_to_ids("de_DE")}


@pytest.mark.parametrize("convention", ["mbart25", "mbart50"])
def test_the_decoder_starts_alike_from_text_padded_on_the_left_and_from_encoder_states(convention, tmp_path):
    """Where the source's tag lies says how the target begins; padding may precede it, and states have no tokens."""
    make_tokenizer, make_model, _ = CONVENTIONS[convention]
    torch.manual_seed(0)
    tokenizer, tokens = make_tokenizer(tmp_path)
    ids = ns.language_token_ids(tokenizer, tokens)
    model = make_model(tokenizer)
    corpus = {p: Dataset.from_dict({"source": s, "target": t}) for p, (s, t) in CORPUS.items()}
    masks = ns.CumulativeThreshold(0.5).select(record_corpus(model, tokenizer, corpus, language_tokens=tokens))
    config = ns.NeuronSpecializationConfig(masks=masks, language_token_ids=ids, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(model, config).eval()
    tokenizer.src_lang = tokens["en"]
    sentences = [TEXT[0], " ".join(TEXT[0].split()[:2])]
    begins = set()
    for side in ("right", "left"):
        batch = dict(tokenizer(sentences, return_tensors="pt", padding=True, padding_side=side))
        assert batch["input_ids"].eq(tokenizer.pad_token_id).any()
        states = model.get_encoder()(**batch, language_pairs="en-de")
        from_states = {"encoder_outputs": states, "attention_mask": batch["attention_mask"]}
        for inputs in (batch, from_states):
            found = model.generate(**inputs, language_pairs="en-de", max_new_tokens=3)
            begins.add(tuple(found[:, : found[0].tolist().index(ids["de"]) + 1].flatten().tolist()))
    start = [] if convention == "mbart25" else [model.config.decoder_start_token_id]
    assert begins == {tuple([*start, ids["de"]] * 2)}
