"""Score a model by generation with beam search, one direction at a time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sacrebleu
from accelerate.utils import gather_object
from datasets import Dataset
from evaluate import load as load_metric
from tqdm.auto import tqdm

from ..neurons.base_model import fixed_positions
from ..neurons.extras import install
from ..neurons.language_pairs import check_pivot, split_pair
from .long_sentences import LongSentences
from .processes import this_process
from .token_loss import check_positions
from .tokenization import encode, resolve_tokens
from .translate import check_long_sentences, translate

_METRIC = Path(__file__).parent / "metrics" / "translation_scores.py"
# unsegmented scripts: 13a would count whole sentences as words
_BLEU_TOKENIZERS = {
    "zh": "zh", "zho": "zh", "cmn": "zh", "yue": "zh",
    "ja": "ja-mecab", "jpn": "ja-mecab",
    "ko": "ko-mecab", "kor": "ko-mecab",
    "th": "char", "tha": "char", "lo": "char", "lao": "char", "km": "char", "khm": "char", "my": "char", "mya": "char",
}  # fmt: skip
SCORES = ("chrf++", "bleu")


def bleu_tokenizer(language: str) -> str:
    """Return sacreBLEU's tokenizer for a target language code, such as "zh" or "zho_Hans"; 13a for most."""
    return _BLEU_TOKENIZERS.get(language.split("_")[0].lower(), "13a")


def check_scorers(target_languages: Iterable[str]) -> None:
    """Raise ImportError if scoring one of the languages needs what is not installed; call it before translating."""
    for language in target_languages:
        tokenizer = bleu_tokenizer(language)
        try:
            sacrebleu.BLEU(tokenize=tokenizer)
        except RuntimeError as error:
            raise ImportError(
                f"BLEU of translations into {language!r} needs a word segmenter ({tokenizer}): "
                f"{install(tokenizer.split('-')[0])}."
            ) from error


def check_lengths(
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Dataset],
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    losses: bool = False,
) -> None:
    """Raise ValueError if `evaluate`, with `losses` also `token_losses`, would refuse a sentence as too long.

    Ask before training.
    """
    for pair, rows in data.items():
        check_long_sentences(model, tokenizer, rows["source"], pair, language_tokens, source_tag)
        if losses and fixed_positions(model) is not None:
            tokens = resolve_tokens(tokenizer, [pair], language_tokens, source_tag)
            encoded = encode(tokenizer, pair, rows["source"], rows["target"], tokens, source_tag)
            check_positions(model, pair, encoded)


def score(predictions: list[str], references: list[str], target_language: str) -> dict[str, Any]:
    """Return BLEU, chrF++ and their signatures for one direction."""
    metric = load_metric(str(_METRIC))
    return metric.compute(predictions=predictions, references=references, tokenize=bleu_tokenizer(target_language))


def evaluate(
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Dataset],
    *,
    pivot: str | None = None,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    batch_size: int = 32,
    long_sentences: LongSentences = "error",
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Translate and score every direction; several processes share the sentences.

    Args:
        model: a seq2seq model, with adapters or without.
        tokenizer: its tokenizer.
        data: pair → Dataset with columns "source" and "target". References are compared whole.
        pivot: language whose directions make the one-to-many and many-to-one averages.
        language_tokens: language code → language token (see `translate`).
        source_tag: what the tag on the source side names (see `translate`).
        batch_size: sentences per batch.
        long_sentences: what to do with sentences of more tokens than the model has positions (see `translate`).
        **generate_kwargs: passed to `model.generate`; five beams by default.

    Returns:
        "directions": pair → scores with signatures, "averages" (see `averages`), and "translations": pair → texts.

    Raises:
        ImportError: if a target language needs a word segmenter that is not installed, before anything is translated.
        ValueError: if the pivot is a language of no direction, or a sentence is too long and `long_sentences` is
            "error", also before anything is translated.
    """
    check_pivot(pivot, data)
    check_scorers(split_pair(pair)[1] for pair in data)
    if long_sentences == "error":
        check_lengths(model, tokenizer, data, language_tokens, source_tag)
    generate_kwargs.setdefault("num_beams", 5)
    directions, translations = {}, {}
    process = this_process()
    total = sum(map(len, data.values()))
    with tqdm(desc="translating", total=total, unit=" sentences", disable=not process.is_main_process) as bar:
        done = 0
        for pair, rows in data.items():
            bar.set_postfix_str(pair)
            sources = list(rows["source"])
            with process.split_between_processes(list(range(len(rows)))) as share:
                own_share = translate(
                    model,
                    tokenizer,
                    [sources[i] for i in share],
                    pair,
                    language_tokens=language_tokens,
                    source_tag=source_tag,
                    batch_size=batch_size,
                    long_sentences=long_sentences,
                    numbers=[i + 1 for i in share],
                    progress=bar,
                    **generate_kwargs,
                )
            translations[pair] = gather_object(own_share)
            done += len(rows)
            bar.update(done - bar.n)  # what other processes translated
    for pair, rows in data.items():
        scores = score(translations[pair], list(rows["target"]), split_pair(pair)[1])
        directions[pair] = {**scores, "sentences": len(rows)}
    return {"directions": directions, "averages": averages(directions, pivot), "translations": translations}


def averages(directions: Mapping[str, Mapping[str, Any]], pivot: str | None) -> dict[str, dict[str, float]]:
    """Return group → mean scores: "one-to-many" out of the pivot, "many-to-one" into it, and "all"."""
    groups = {"all": list(directions)}
    if pivot is not None:
        groups["one-to-many"] = [pair for pair in directions if split_pair(pair)[0] == pivot]
        groups["many-to-one"] = [pair for pair in directions if split_pair(pair)[1] == pivot]
    return {
        name: {score: sum(directions[pair][score] for pair in pairs) / len(pairs) for score in SCORES}
        for name, pairs in groups.items()
        if pairs
    }


def score_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one table row per direction, then one per average."""
    rows = [{"direction": pair, **{s: v[s] for s in SCORES}} for pair, v in result["directions"].items()]
    return rows + [{"direction": f"mean {name}", **values} for name, values in result["averages"].items()]
