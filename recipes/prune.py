r"""Prune neurons of sequentially trained models, and measure what that costs in quality, forgetting and robustness.

python recipes/prune.py --config recipes/configs/transfer_sequentially/tatoeba.yaml \
    --config recipes/configs/prune/tatoeba.yaml --train_file data/tatoeba/{pair}.parquet \
    --validation_file data/tatoeba/{pair}.parquet --test_file data/tatoeba/{pair}.parquet \
    --transfer_dir build/tatoeba --output_dir build/tatoeba-pruned

Takes the options of the transfer that it starts from, whose stages must be done. Neurons are chosen on validation data
and scored on test data. What is done is skipped; `--export CHOICE=RATE` writes pruned models as smaller checkpoints.
"""

from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from neuron_specialization.analysis.mass_activation import MassActivation
from neuron_specialization.analysis.mass_plots import plot_pruning
from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.analysis.pruning import for_pairs
from neuron_specialization.analysis.pruning_choices import check_choices, choose, pruning_table
from neuron_specialization.baselines.pruned import (
    NOTHING,
    PruneArguments,
    PrunedStage,
    Pruning,
    check_stages,
    collect_pruned,
    pruned_stages,
)
from neuron_specialization.baselines.sequential import SequentialTransfer
from neuron_specialization.baselines.transfer_data import TRANSFER_ARGUMENTS, UNUSED_ARGUMENTS, load_finished
from neuron_specialization.baselines.transfer_plan import (
    SEQUENTIAL,
    Stage,
    collect,
)
from neuron_specialization.export.compaction import compact, save_compact
from neuron_specialization.translation.arguments import as_mapping
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.results import table, write_results


def main() -> None:
    prune, *arguments = parse(PruneArguments, *TRANSFER_ARGUMENTS, unused=UNUSED_ARGUMENTS)
    disable_progress_bars()
    transfer, output = load_finished(prune.transfer_dir, *arguments)
    check(prune, transfer)
    pruning = Pruning(transfer, output, prune.retraining_updates)
    masses: dict[Stage, MassActivation] = {}

    def masks_of(pruned: PrunedStage) -> Any:
        if pruned.start not in masses:
            masses.clear()  # each takes about 100 MB
            masses[pruned.start] = recorded(transfer, pruned.start)
        masks = choose(masses[pruned.start], pruned.criterion, pruned.rate, pruned.scope, pruned.draw)
        return for_pairs(masks, transfer.language_pairs)

    for pruned in pruned_stages(prune, transfer) if not prune.tables_only else []:
        if not pruning.is_done(pruned):
            print(f"== {pruned.path}", flush=True)
            pruning.run(pruned, None if pruned.criterion == NOTHING else masks_of(pruned))
    for choice, rate in as_mapping(prune.export).items():
        for order in transfer.orders:
            pruned = PrunedStage(Stage(SEQUENTIAL, 0, order), "after", choice, float(rate), prune.scopes[0])
            smaller = compact(pruning.export(pruned, masks_of(pruned)), transfer.language_pairs[0])
            save_compact(smaller, output / "exported" / pruned.path, transfer.tokenizer)
            print(f"wrote {output / 'exported' / pruned.path}")
    rows, found = collect_pruned(output), collect(transfer.directory)
    tables = {score: pruning_table(found["rows"], rows, score) for score in ("bleu", "chrf++")}
    results = {"rows": rows, "tables": tables, "signatures": found["signatures"], "arguments": vars(prune)}
    print(table(tables["bleu"]))
    draw(tables["bleu"], output)
    print(f"wrote {write_results(output, results)}")


def check(prune: PruneArguments, transfer: SequentialTransfer) -> None:
    """Refuse what cannot be done before anything is recorded."""
    check_choices(prune.criteria, prune.rates, prune.scopes, transfer.language_pairs, transfer.model)
    exported = as_mapping(prune.export)
    check_choices(exported, map(float, exported.values()), [], transfer.language_pairs, transfer.model)
    check_stages(prune, transfer)


def draw(lines: list[dict[str, Any]], output: Path) -> None:
    """Draw quality, forgetting and what noise costs against the share pruned, for each model."""
    for name in dict.fromkeys((line["order"], line["when"], line["seed"]) for line in lines):
        chosen = [line for line in lines if (line["order"], line["when"], line["seed"]) == name]
        stem = "-".join(map(str, name)).replace("/", "_")
        plot_pruning(chosen, output / f"{stem}.svg")
        for value in ("forgetting", "noise costs"):
            if all(value in line for line in chosen):
                plot_pruning(chosen, output / f"{stem}-{value.replace(' ', '-')}.svg", value, f"{value} (BLEU)")


def recorded(transfer: SequentialTransfer, stage: Stage) -> MassActivation:
    """Record a model's neurons on the validation data."""
    model, ids = transfer.load(stage), range(len(transfer.tokenizer))
    return record_mass(model, transfer.batches(model), token_ids=ids, progress=False)


if __name__ == "__main__":
    run(main)
