"""Verify that exports of an adapted model translate as it does: identical translations and BLEU on test sentences."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..adapter.active import active_config
from ..neurons.language_pairs import split_pair
from .evaluation import score
from .processes import this_process
from .text_files import weights_of
from .tokenization import encode
from .translate import pair_tokens, text_of, translate_tokens


class Verification:
    """Test sentences and their translations by a model with an adapter, to compare its exports with.

    Args:
        model: the model; it is moved to this process's device.
        tokenizer: its tokenizer.
        pair: the direction.
        sample: Dataset with columns "source" and "target".
        language_tokens: language code → language token, where the adapter does not know its own.
        num_beams: beams.

    Attributes:
        tokens: language code → language token of the pair.
        target_token: the target's language token where generation begins with it; None where the source carries it.
        translations: the model's translations of the sample, as tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pair: str,
        sample: Dataset,
        language_tokens: Mapping[str, str] | None,
        num_beams: int,
    ) -> None:
        self.pair, self.num_beams = pair, num_beams
        self.sources, self.references = list(sample["source"]), list(sample["target"])
        self.source_tag = active_config(model).source_tag
        self.tokens = pair_tokens(model, tokenizer, pair, language_tokens, self.source_tag)
        self.target_token = self.tokens[split_pair(pair)[1]] if self.source_tag == "source" else None
        self.translations = self.translate(model, tokenizer)

    def translate(self, model: Any, tokenizer: Any) -> list[list[str]]:
        """Return the sample's translations by a transformers model, as tokens."""
        options = {"language_tokens": self.tokens, "source_tag": self.source_tag, "num_beams": self.num_beams}
        return translate_tokens(model.to(this_process().device), tokenizer, self.sources, self.pair, **options)

    def input_ids(self, tokenizer: Any) -> list[list[int]]:
        """Return the sample's source sentences encoded with their tags."""
        return encode(tokenizer, self.pair, self.sources, None, self.tokens, self.source_tag)["input_ids"]

    def row(
        self,
        name: str,
        parameters: Iterable[torch.Tensor],
        directory: Path | None,
        tokenizer: Any,
        translations: list[list[str]],
    ) -> dict[str, Any]:
        """Return one row of the table of exports.

        Args:
            name: of the export.
            parameters: its parameters.
            directory: where its weights are; None to count the bytes of the parameters.
            tokenizer: the tokenizer of its tokens.
            translations: its translations of the sample, as tokens.
        """
        same = sum(a == b for a, b in zip(translations, self.translations, strict=True)) / len(self.translations)
        bleu = score(text_of(tokenizer, translations), self.references, split_pair(self.pair)[1])["bleu"]
        sizes = [(parameter.numel(), parameter.nbytes) for parameter in parameters]
        count, size = map(sum, zip(*sizes, strict=True))
        if directory is not None:
            size = sum(stored for stored, _ in weights_of(directory).values())
        return {"export": name, "parameters": count, "MB": size / 1e6, "identical": same, "BLEU": bleu}
