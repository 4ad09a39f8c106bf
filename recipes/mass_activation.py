r"""Look into sequentially trained models: the mass of their neurons, what changes from step to step, what it predicts.

python recipes/mass_activation.py --config recipes/configs/transfer_sequentially/tatoeba.yaml \
    --train_file data/tatoeba/{pair}.parquet --validation_file data/tatoeba/{pair}.parquet \
    --test_file data/tatoeba/{pair}.parquet --transfer_dir build/tatoeba --output_dir build/tatoeba-mass \
    --tagged_file data/ud_ewt/validation.parquet

Takes the options of the transfer, and whatever stages of it are done. Everything is recorded on validation data. The
tagged file has the columns text, tokens and upos. Needs the extra `report`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from neuron_specialization.analysis.mass_activation import MassActivation
from neuron_specialization.analysis.mass_plots import plot_attention
from neuron_specialization.analysis.mass_prediction import (
    add_features,
    early_and_later,
    growth_and_change,
    mass_against_attribution,
    predictors,
)
from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.analysis.mass_report import change_table, draw_steps, draw_tags
from neuron_specialization.analysis.sites import SITES
from neuron_specialization.baselines.sequential import SequentialTransfer
from neuron_specialization.baselines.transfer_data import TRANSFER_ARGUMENTS, UNUSED_ARGUMENTS, load_finished
from neuron_specialization.baselines.transfer_plan import SEQUENTIAL, Stage, collect
from neuron_specialization.translation.attention import cross_attention
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.recording import tagged_text, vocabulary_digest
from neuron_specialization.translation.results import table, write_results


@dataclass
class MassArguments:
    """What is recorded."""

    transfer_dir: str = field(metadata={"help": "Output directory of transfer_sequentially.py."})
    site: str = field(default="pre_activation", metadata={"help": "pre_activation, neurons or residual."})
    tagged_file: str | None = field(
        default=None, metadata={"help": "Source text with the columns text, tokens and upos."}
    )


def main() -> None:
    args, *arguments = parse(MassArguments, *TRANSFER_ARGUMENTS, unused=UNUSED_ARGUMENTS)
    if args.site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {args.site!r}.")
    disable_progress_bars()
    transfer, output = load_finished(args.transfer_dir, *arguments)
    rows: list[dict[str, Any]] = []
    attribution: list[dict[str, Any]] = []
    done = [stage for stage in transfer.stages() if transfer.is_done(stage)]
    scores = collect(transfer.directory)["rows"]
    for stage in done:
        about = stage.about()
        rows += add_features(scores, about, recorded(transfer, stage, args.site, output))
        if transfer.is_final(stage):
            neurons = recorded(transfer, stage, "neurons", output)
            validation, options = transfer.data["validation"], {**transfer.convention(), "measure": "attribution"}
            gradients = record_corpus(transfer.load(stage), transfer.tokenizer, validation, **options)
            attribution += [{**about, **line} for line in mass_against_attribution(neurons, gradients)]
    orders = ["/".join(order) for order in transfer.orders]
    growth = growth_and_change(rows, orders)
    found = {
        "predictors": predictors(early_and_later(rows, orders), "later"),
        "growth": predictors(growth, "change", ["growth"]),
        "attribution": attribution,
        "changes": draw(transfer, set(done), args, output),
    }
    print(*(f"{name}\n{table(lines)}\n" for name, lines in found.items()), sep="\n")
    print(f"wrote {write_results(output, {**found, 'rows': rows, 'steps': growth, 'arguments': vars(args)})}")


def recorded(transfer: SequentialTransfer, stage: Stage, site: str, output: Path) -> MassActivation:
    """Record a stage's model on the validation data, once."""
    path = output / "mass" / stage.path / f"{site}.safetensors"
    if not path.is_file():
        model, tokenizer = transfer.load(stage), transfer.tokenizer
        options = {"token_ids": range(len(tokenizer)), "vocabulary": vocabulary_digest(tokenizer)}
        path.parent.mkdir(parents=True, exist_ok=True)
        record_mass(model, transfer.batches(model), site, **options).save(path)
    return MassActivation.load(path)


def draw(transfer: SequentialTransfer, done: set[Stage], args: MassArguments, output: Path) -> list[dict[str, Any]]:
    """Draw the first order, seed 0, if it is done; return its table of changes."""
    order = transfer.orders[0]
    steps = [Stage(SEQUENTIAL, 0, order[:step]) for step in range(1, len(order) + 1)]
    names = {"pre-trained": steps[0].start, **{f"+ {stage.trained[-1]}": stage for stage in steps}}
    if not done >= set(names.values()):
        return []
    tokenizer, pair = transfer.tokenizer, order[0]
    masses = {name: recorded(transfer, stage, args.site, output) for name, stage in names.items()}
    draw_steps(masses, pair, tokenizer.convert_ids_to_tokens, output / "figures")
    last = transfer.load(steps[-1])
    sentence = next(row for row in transfer.data["test"][order[-1]] if 5 <= len(row["source"].split()) <= 8)
    attention = cross_attention(
        last, tokenizer, sentence["source"], sentence["target"], order[-1], **transfer.convention()
    )
    plot_attention(*attention, output / "figures" / "attention.svg", f"{order[-1]}, last decoder layer")
    if args.tagged_file:
        text, tags = tagged_text(args.tagged_file, pair)
        tagged = {}
        for name, stage in {**names, "joint": Stage("joint", 0, tuple(transfer.language_pairs))}.items():
            if stage in done:
                model = transfer.load(stage)
                tagged[name] = record_mass(model, transfer.batches(model, text, tags), stack="encoder", tags=tags)
        draw_tags(tagged, pair, output / "figures" / "tags.svg")
    return change_table(masses, pair)


if __name__ == "__main__":
    run(main)
