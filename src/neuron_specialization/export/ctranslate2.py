"""Compact models for CTranslate2, converted from memory: it reads each layer's width, so nothing is padded."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from typing import Any

import torch

from ..neurons.extras import install
from ..neurons.files import atomic_directory, complete_writing

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16")


def save_ctranslate2(
    model: Any,
    tokenizer: Any,
    directory: str | PathLike[str],
    quantization: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a plain transformers model, such as `ns.compact` returns, into a CTranslate2 model directory.

    Args:
        model: the model; it may be ragged. It is left as it is.
        tokenizer: its tokenizer, written beside the converted model.
        directory: where to write; see `neurons.files.atomic_directory`.
        quantization: one of QUANTIZATIONS, or None to keep the type of the weights.
        overwrite: also replace files of the same names that this package did not write.

    Raises:
        ValueError: if CTranslate2 cannot convert this architecture, or does not know the quantization.
        ImportError: if CTranslate2 is not installed (the extra `export`).
    """
    loader = check_convertible(model, quantization)
    from ctranslate2.converters import Converter

    # CTranslate2 scales the weights in place before it rounds them to integers
    weights = copy.deepcopy(model) if quantization is not None and quantization.startswith("int") else model

    class FromMemory(Converter):
        """CTranslate2's own converter reads from the disk, where layers of one stack cannot differ in width."""

        def _load(self) -> Any:
            with _config_for_ctranslate2(weights.config, tokenizer):
                return loader(weights, _WholeVocabulary(tokenizer, len(weights.get_input_embeddings().weight)))

    with atomic_directory(directory, overwrite) as fresh:
        FromMemory().convert(str(fresh), quantization=quantization, force=True)
        tokenizer.save_pretrained(fresh)


def load_ctranslate2(directory: str | PathLike[str], threads: int = 0) -> Any:
    """Return a `ctranslate2.Translator` on the CPU, and leave torch's number of threads as it is.

    The two share OpenMP: creating a translator would change torch's number of threads as well.

    Args:
        directory: what `save_ctranslate2` wrote.
        threads: threads per batch (`intra_threads`), 0 for CTranslate2's choice. One is fastest for one sentence.
    """
    from ctranslate2 import Translator

    with suppress(OSError):
        complete_writing(directory)
    of_torch = torch.get_num_threads()
    try:
        return Translator(str(directory), intra_threads=threads)
    finally:
        torch.set_num_threads(of_torch)


def translate_ctranslate2(
    translator: Any,
    tokenizer: Any,
    input_ids: Sequence[Sequence[int]],
    target_token: str | None = None,
    *,
    num_beams: int = 5,
    max_length: int = 256,
    batch_size: int = 32,
) -> list[list[str]]:
    """Translate encoded sentences with a CTranslate2 translator; return tokens, the special ones left out.

    Args:
        translator: a `ctranslate2.Translator` of a directory that `save_ctranslate2` wrote.
        tokenizer: the model's tokenizer.
        input_ids: token ids of each source sentence with its tags, as `translation.tokenization.encode` returns them.
        target_token: the target's language token, which opens every translation; None where the source carries it.
        num_beams: beams.
        max_length: longest translation in tokens; within the model's positions.
        batch_size: sentences per batch.
    """
    results = translator.translate_batch(
        [tokenizer.convert_ids_to_tokens(list(row)) for row in input_ids],
        target_prefix=[[] if target_token is None else [target_token]] * len(input_ids),
        beam_size=num_beams,
        max_decoding_length=max_length,
        max_batch_size=batch_size,
    )
    special = {*tokenizer.all_special_tokens, target_token}
    return [[token for token in result.hypotheses[0] if token not in special] for result in results]


def check_convertible(model: Any, quantization: str | None) -> Any:
    """Return CTranslate2's loader for a model's architecture; raises as `save_ctranslate2` does, before any work."""
    try:
        from ctranslate2.converters.transformers import _MODEL_LOADERS
    except ImportError as error:
        raise ImportError(f"CTranslate2 is missing: {install('export')}.") from error
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
    loader = _MODEL_LOADERS.get(type(model.config).__name__)
    if loader is None:
        known = ", ".join(sorted(name.removesuffix("Config") for name in _MODEL_LOADERS))
        raise ValueError(f"CTranslate2 cannot convert a {type(model).__name__}; it converts: {known}.")
    return loader


class _WholeVocabulary:
    """A tokenizer with an entry for every row of the embeddings: CTranslate2 takes the n-th entry for row n.

    mBART-50's vocabulary has a hole, and M2M100's tags are not in its own.
    """

    num_madeup_words = 0  # how many entries CTranslate2 adds for M2M100; here none are missing

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self._tokenizer, self._rows = tokenizer, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @property
    def bos_token(self) -> str:
        """mBART-50's tokenizer has none, and CTranslate2 cannot read a model without one; it is never inserted."""
        return self._tokenizer.bos_token or self._tokenizer.eos_token

    def get_vocab(self) -> dict[str, int]:
        vocabulary = {**self._tokenizer.get_vocab(), **getattr(self._tokenizer, "lang_token_to_id", {})}
        taken = set(vocabulary.values())
        return vocabulary | {f"<unused_{i}>": i for i in range(self._rows) if i not in taken}


@contextmanager
def _config_for_ctranslate2(config: Any, tokenizer: Any) -> Iterator[None]:
    """Set the fields of a model's config that CTranslate2 reads and transformers 5 leaves unset or sets otherwise."""
    values: dict[str, Any] = {}
    if config.model_type in ("t5", "mt5"):
        # CTranslate2 scales the decoder's output before the LM head if `tie_word_embeddings`, which transformers 5
        # sets for the whole family; `scale_decoder_outputs` is what decides (mT5 never scales).
        values["tie_word_embeddings"] = config.model_type == "t5" and config.scale_decoder_outputs
    if config.model_type == "mbart":
        # mBART is always pre-norm in transformers, whose config may not say so.
        values["normalize_before"] = True
        # Whether the tag itself opens the decoder's input (mBART-25: it ends the labels, and the last label is moved
        # to the front) or follows the end token (mBART-50).
        follows = tokenizer("")["input_ids"][-1] == tokenizer.eos_token_id
        values["tokenizer_class"] = "MBart50Tokenizer" if follows else "MBartTokenizer"
    before = {name: vars(config).get(name) for name in values}
    try:
        vars(config).update(values)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del vars(config)[name]
            else:
                vars(config)[name] = value
