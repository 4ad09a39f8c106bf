"""What `recipes/identify.py` prints about masks: how much pairs share, and how stable the selection is."""

from typing import Any

from ..neurons.ffn import STACKS
from ..neurons.masks import NeuronMasks
from ..neurons.stability import STABLE_IOU
from .results import table

MOST_COLUMNS = 12


def report_kept(masks: NeuronMasks) -> dict[str, dict[str, float]]:
    """Print the share of neurons kept by block, and return it: pair → block name → share."""
    kept = {pair: {name: 1 - share for name, share in masks.sparsity(pair).items()} for pair in masks.language_pairs}
    print("share of neurons kept")
    print(table([{"block": name, **{pair: kept[pair][name] for pair in kept}} for name in masks.rows]))
    return kept


def report_overlap(masks: NeuronMasks) -> dict[str, dict[str, dict[str, float]]]:
    """Print how much of their neurons pairs share: every two of them, or of many the mean for each.

    Returns:
        Stack → what `NeuronMasks.mean_overlap` returns.
    """
    overlap = {stack: masks.mean_overlap(stack) for stack in STACKS if stack in masks.stacks.values()}
    for stack, of in overlap.items():
        print(f"overlap of the pairs' neurons in the {stack} (IoU, mean over blocks)")
        if len(of) <= MOST_COLUMNS:
            print(table([{"pair": pair, **others} for pair, others in of.items()]))
        else:
            means = {pair: (sum(others.values()) - 1) / (len(of) - 1) for pair, others in of.items()}
            print(table([{"pair": pair, "mean with the others": mean} for pair, mean in means.items()]))
    return overlap


def report_stability(result: dict[str, Any]) -> dict[str, Any]:
    """Print what `neurons.stability.stability` found, and return it."""
    print("IoU of split halves with each other, and of growing samples with the full mask")
    growing = {f"{step['share']:.3f} of sample": step["iou"] for step in result["growing"][:-1]}
    pairs = result["halves"]
    print(table([{"pair": p, "halves": pairs[p], **{name: iou[p] for name, iou in growing.items()}} for p in pairs]))
    if result["unstable"]:
        print(
            f"WARNING: half of the sample gives masks with an IoU below {STABLE_IOU} for "
            f"{', '.join(result['unstable'])}; use more sentences."
        )
    return result
