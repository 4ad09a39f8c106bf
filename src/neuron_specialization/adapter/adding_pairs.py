"""Add language pairs to a trained adapter without changing what it does for the pairs it has."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

from ..neurons.adapter_file import mask_key, pack_rows
from ..neurons.masks import NeuronMasks
from .config import NeuronSpecializationConfig
from .rollback import rolled_back_on_error

_TAKEN_OVER = (
    *("trainable", "mask_bias", "update_only", "execution", "source_tag", "default_pair", "task_type"),
    *("target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices"),
)


def add_pairs(
    model: Any,
    adapter: str | PathLike[str],
    masks: NeuronMasks,
    protected_pairs: Sequence[str] = (),
    language_token_ids: Mapping[str, int] | None = None,
) -> PeftModel:
    """Adapt `model` to go on training an adapter with more pairs.

    ΔW1 is shared by all pairs, and starts as the adapter left it. The rows of protected pairs are frozen, so that
    their outputs stay bit-identical; new pairs use these rows too where their masks keep them.

    Args:
        model: the base that the adapter was trained on.
        adapter: directory or Hub id of an adapter with `trainable="delta"`.
        masks: the neurons of the pairs to add. A pair that the adapter has must keep the same neurons in both.
        protected_pairs: pairs of the adapter whose outputs must not change.
        language_token_ids: language code → id of its token, where neither adapter nor masks know it.

    Raises:
        ValueError: if the adapter trained something else, if it and the masks do not fit together, or if a protected
            pair is unknown.
    """
    config: Any = NeuronSpecializationConfig.from_pretrained(str(adapter))
    if config.trainable != "delta":
        raise ValueError(
            f"Pairs are added to adapters with trainable='delta', whose base is intact and whose pairs own rows of "
            f"ΔW1; {adapter} has trainable={config.trainable!r}."
        )
    joined = NeuronMasks.from_pretrained(adapter).concatenate(masks)
    extended = NeuronSpecializationConfig(
        masks=joined,
        protected_pairs=list(protected_pairs) or None,
        language_token_ids={**(joined.language_token_ids or {}), **(language_token_ids or {})} or None,
        **{name: getattr(config, name) for name in _TAKEN_OVER},
    )
    extended.other_tensors = config.other_tensors
    rows = {mask_key(block): pack_rows(rows) for block, rows in joined.rows.items()}
    with rolled_back_on_error(model):
        adapted = get_peft_model(model, extended)
        set_peft_model_state_dict(adapted, {**load_peft_weights(str(adapter), device="cpu"), **rows})
    return adapted


def trainable_shares(masks: NeuronMasks, protected_pairs: Sequence[str], pairs: Sequence[str]) -> dict[str, float]:
    """Return pair → share of the rows of ΔW1 it uses that protected pairs leave to train, over all blocks.

    Args:
        masks: the neurons of all pairs.
        protected_pairs: pairs whose rows are frozen.
        pairs: pairs to train.

    Raises:
        ValueError: if nothing is left to train for a pair.
    """
    shares = {}
    for pair in pairs:
        kept = left = 0
        for block in masks.rows:
            row = masks.row(pair, block)
            kept += int(row.sum())
            for protected in protected_pairs:
                row = row & ~masks.row(protected, block)
            left += int(row.sum())
        shares[pair] = left / kept
    stuck = [pair for pair, share in shares.items() if share == 0]
    if stuck:
        raise ValueError(
            f"The protected pairs ({', '.join(protected_pairs)}) use every row of ΔW1 that {', '.join(stuck)} would "
            "train. Protect fewer pairs, or keep fewer neurons for them (a smaller k)."
        )
    return shares
