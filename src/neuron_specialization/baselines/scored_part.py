"""What a trained model is judged by: losses and scores of its directions, the same for every kind of stage."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..translation.evaluation import SCORES, evaluate
from ..translation.token_loss import token_losses


def scored_part(
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Mapping[str, Dataset]],
    pairs: Sequence[str],
    about: Mapping[str, Any],
    *,
    batch_size: int,
    num_beams: int,
    **convention: Any,
) -> dict[str, Any]:
    """Return what a stage keeps of its model: "rows", "signatures", and "translations" with how they were made.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        data: "validation", "test" → pair → Dataset with columns "source" and "target".
        pairs: the directions.
        about: what every row begins with.
        batch_size: sentences per batch.
        num_beams: beams.
        **convention: how text is tagged, as the functions of `translation` take it.

    Returns:
        One row per direction, with the losses of both splits in nats per token and the scores on the test split.

    Raises:
        ValueError: if a loss is not finite.
    """
    of = {split: {pair: data[split][pair] for pair in pairs} for split in ("validation", "test")}
    options = {"batch_size": batch_size, **convention}
    losses = {split: token_losses(model, tokenizer, rows, **options) for split, rows in of.items()}
    wrong = [pair for pair in pairs if not all(math.isfinite(of_split[pair]) for of_split in losses.values())]
    if wrong:
        raise ValueError(f"The loss is not finite in {', '.join(wrong)}: the training diverged.")
    scored = evaluate(model, tokenizer, of["test"], num_beams=num_beams, **options)
    directions = scored["directions"]
    rows = [
        {
            **about,
            "direction": pair,
            "loss": losses["test"][pair],
            "validation_loss": losses["validation"][pair],
            **{name: directions[pair][name] for name in SCORES},
        }
        for pair in pairs
    ]
    signatures = {pair: {k: v for k, v in directions[pair].items() if k.endswith("signature")} for pair in pairs}
    return {
        "rows": rows,
        "signatures": signatures,
        "translations": scored["translations"],
        "num_beams": num_beams,
        "language_tokens": convention.get("language_tokens"),
    }
