r"""Learn one language pair after another from a pre-trained copier, and measure what is kept and what is forgotten.

python recipes/transfer_sequentially.py \
    --config recipes/configs/transfer_sequentially/tatoeba.yaml --train_file data/tatoeba/{pair}.parquet \
    --validation_file data/tatoeba/{pair}.parquet --test_file data/tatoeba/{pair}.parquet --output_dir build/tatoeba

Beside it stand joint and bilingual training, and the same steps under each pair's own neurons. Stages that are done
are skipped and one that was cut off goes on where it was; `--tables_only true` makes the tables of whatever is there.
"""

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from datasets import disable_progress_bars

from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.forgetting import robustness_table, score_matrix, transfer_table
from neuron_specialization.analysis.mass_plots import plot_matrix
from neuron_specialization.baselines.sequential import SequentialTransfer
from neuron_specialization.baselines.transfer_data import (
    TRANSFER_ARGUMENTS,
    UNUSED_ARGUMENTS,
    load_transfer,
    settings_of,
)
from neuron_specialization.baselines.transfer_plan import MASKS, SEQUENTIAL, collect
from neuron_specialization.neurons.masks import NeuronMasks
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results


@dataclass
class RunArguments:
    """What to do now."""

    tables_only: bool = field(default=False, metadata={"help": "Train nothing: make the tables again."})


def main() -> None:
    now, *arguments = parse(RunArguments, *TRANSFER_ARGUMENTS, unused=UNUSED_ARGUMENTS)
    check_single_process()
    check_figures()
    disable_progress_bars()
    transfer, checked = load_transfer(*arguments)
    print(table(checked))
    for stage in transfer.stages() if not now.tables_only else []:
        print(f"\n== {stage.path}", flush=True)
        transfer.run(stage)
    report(transfer, {"data": checked, "settings": settings_of(*arguments)})


def report(transfer: SequentialTransfer, about: dict[str, Any]) -> None:
    """Print and write the tables of whatever stages are there."""
    found = collect(transfer.directory)
    orders = ["/".join(order) for order in transfer.orders]
    tables = {score: transfer_table(found["rows"], orders, score) for score in ("bleu", "chrf++")}
    parts = [f"Scores in {score}\n\n{table(rows)}" for score, rows in tables.items()]
    every = ((method, order) for method in (SEQUENTIAL, MASKS) for order in orders)
    matrices = {(method, order): score_matrix(found["rows"], order, method=method) for method, order in every}
    begun = {key: matrix for key, matrix in matrices.items() if not np.isnan(matrix[1:]).all()}
    for (method, order), matrix in begun.items():
        pairs = order.split("/")
        steps = ["before", *pairs]
        lines = [
            {"after": step, **dict(zip(pairs, row, strict=True))} for step, row in zip(steps, matrix, strict=True)
        ]
        parts.append(f"BLEU after each step, {method}, seed 0\n\n{table(lines)}")
    masked = sorted({stage["seed"] for stage in found["stages"] if stage["method"] == MASKS})
    overlap = [row for seed in masked for row in mask_overlap(transfer.masks(seed), seed)]
    if overlap:
        parts.append(f"IoU of the neurons that the masks keep\n\n{table(overlap)}")
    if found["robustness"]:
        parts.append(f"Robustness\n\n{table(robustness_table(found['robustness']))}")
    text = "\n\n".join(parts) + "\n"
    print("\n" + text)
    (transfer.directory / "tables.md").write_text(text, encoding="utf-8")
    results = {**found, "transfer": tables, "mask overlap": overlap, **about}
    print(f"wrote {write_results(transfer.directory, results)}")
    whole = {key: matrix for key, matrix in begun.items() if not np.isnan(matrix).any()}
    if whole:
        plot_matrix(whole, transfer.directory / "matrix.svg", "BLEU")


def mask_overlap(masks: NeuronMasks, seed: int) -> list[dict[str, Any]]:
    """Return the IoU of what every two pairs keep of each FFN block."""
    every_two = combinations(masks.language_pairs, 2)
    return [{"seed": seed, "pair": one, "other": other, **masks.iou(one, other)} for one, other in every_two]


if __name__ == "__main__":
    run(main)
