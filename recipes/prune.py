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

from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.mass_activation import MassActivation
from neuron_specialization.analysis.mass_plots import plot_pruning
from neuron_specialization.analysis.mass_recording import record_mass, trackable_tokens
from neuron_specialization.analysis.pruning import NO_MASS, for_pairs, mass_shares
from neuron_specialization.analysis.pruning_choices import (
    check_choices,
    choose,
    needs_tokens,
    parse_exports,
    pruning_table,
)
from neuron_specialization.baselines.pruned import (
    NOTHING,
    PruneArguments,
    PrunedStage,
    Pruning,
    check_stages,
    collect_pruned,
    exported_stages,
    pruned_stages,
)
from neuron_specialization.baselines.sequential import SequentialTransfer
from neuron_specialization.baselines.transfer_data import (
    TRANSFER_ARGUMENTS,
    UNUSED_ARGUMENTS,
    load_finished,
    settings_of,
)
from neuron_specialization.baselines.transfer_plan import Stage, collect
from neuron_specialization.export.compaction import compact, save_compact
from neuron_specialization.neurons.masks import NeuronMasks
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results


def main() -> None:
    prune, *arguments = parse(PruneArguments, *TRANSFER_ARGUMENTS, unused=UNUSED_ARGUMENTS)
    check_single_process()
    check_figures()
    exports = parse_exports(prune.export)
    disable_progress_bars()
    transfer, output = load_finished(prune.transfer_dir, *arguments)
    exported = exported_stages(exports, prune.scopes[0], transfer)
    check(prune, exported, transfer)
    pruning = Pruning(transfer, output, prune.retraining_updates)
    by_token = needs_tokens([*prune.criteria, *(pruned.criterion for pruned in exported)])
    masses: dict[Stage, MassActivation] = {}

    def chosen(pruned: PrunedStage) -> tuple[NeuronMasks, dict[str, float]]:
        if pruned.start not in masses:
            masses.clear()  # with credit by token, each takes up to 1 GB
            masses[pruned.start] = recorded(transfer, pruned.start, by_token)
        masks = choose(masses[pruned.start], pruned.criterion, pruned.rate, pruned.scope, pruned.draw)
        return for_pairs(masks, transfer.language_pairs), mass_shares(masks, masses[pruned.start])

    for pruned in pruned_stages(prune, transfer) if not prune.tables_only else []:
        if not pruning.is_done(pruned):
            print(f"== {pruned.path}", flush=True)
            pruning.run(pruned, *((None, NO_MASS) if pruned.criterion == NOTHING else chosen(pruned)))
    for pruned in exported if not prune.tables_only else []:
        smaller = compact(pruning.export(pruned, chosen(pruned)[0]), transfer.language_pairs[0])
        save_compact(smaller, output / "exported" / pruned.path, transfer.tokenizer)
        print(f"wrote {output / 'exported' / pruned.path}")
    rows, found = collect_pruned(output), collect(transfer.directory)
    tables = {score: pruning_table(found["rows"], rows, score) for score in ("bleu", "chrf++")}
    about = {"signatures": found["signatures"], "arguments": vars(prune), "settings": settings_of(*arguments)}
    print(table(tables["bleu"]))
    print(f"wrote {write_results(output, {'rows': rows, 'tables': tables, **about})}")
    draw(tables["bleu"], output)


def check(prune: PruneArguments, exported: list[PrunedStage], transfer: SequentialTransfer) -> None:
    """Refuse what cannot be done before anything is recorded."""
    choices = [*prune.criteria, *(pruned.criterion for pruned in exported)]
    rates = [*prune.rates, *(pruned.rate for pruned in exported)]
    check_choices(choices, rates, prune.scopes, transfer.language_pairs, transfer.model)
    check_stages(prune, transfer, exported)


def draw(lines: list[dict[str, Any]], output: Path) -> None:
    """Draw quality, forgetting and what noise costs against the share pruned, for each model."""
    for name in dict.fromkeys((line["order"], line["when"], line["seed"]) for line in lines):
        chosen = [line for line in lines if (line["order"], line["when"], line["seed"]) == name]
        stem = "-".join(map(str, name)).replace("/", "_")
        plot_pruning(chosen, output / f"{stem}.svg")
        for value in ("forgetting", "noise costs"):
            if all(value in line for line in chosen):
                plot_pruning(chosen, output / f"{stem}-{value.replace(' ', '-')}.svg", value, f"{value} (BLEU)")


def recorded(transfer: SequentialTransfer, stage: Stage, by_token: bool) -> MassActivation:
    """Record a model's neurons on the validation data, with credit by token where a criterion needs it."""
    model, vocabulary, tokens = transfer.load(stage), len(transfer.tokenizer), []
    if by_token:
        tokens = trackable_tokens(model, transfer.batches(model), vocabulary)
        print(f"credit by token: {len(tokens)} of {vocabulary} tokens are tracked", flush=True)
    return record_mass(model, transfer.batches(model), token_ids=tokens, progress=False)


if __name__ == "__main__":
    run(main)
