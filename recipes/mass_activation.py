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

from neuron_specialization.analysis import mass_prediction
from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.mass_activation import MassActivation
from neuron_specialization.analysis.mass_plots import plot_attention, plot_tag_shares
from neuron_specialization.analysis.mass_recording import record_mass, trackable_tokens
from neuron_specialization.analysis.mass_report import change_table, draw_steps, tag_table
from neuron_specialization.analysis.sites import SITES
from neuron_specialization.baselines import transfer_data
from neuron_specialization.baselines.sequential import SequentialTransfer
from neuron_specialization.baselines.settings import check_settings
from neuron_specialization.baselines.transfer_plan import JOINT, SEQUENTIAL, Stage, collect, losses_of
from neuron_specialization.translation.attention import cross_attention, example_sentence
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.recording import vocabulary_digest
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.tagged_text import load_tagged_text


@dataclass
class MassArguments:
    """What is recorded."""

    transfer_dir: str = field(metadata={"help": "Output directory of transfer_sequentially.py."})
    site: str = field(default="pre_activation", metadata={"help": "pre_activation, neurons or residual."})
    tagged_file: str | None = field(default=None, metadata={"help": "Text with parts of speech; recorded at neurons."})


def main() -> None:
    args, *arguments = parse(MassArguments, *transfer_data.TRANSFER_ARGUMENTS, unused=transfer_data.UNUSED_ARGUMENTS)
    if args.site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {args.site!r}.")
    check_single_process()
    check_figures()
    disable_progress_bars()
    transfer, output = transfer_data.load_finished(args.transfer_dir, *arguments)
    tagged = load_tagged_text(args.tagged_file, transfer.orders[0][0]) if args.tagged_file else None
    models = losses_of(transfer.directory)
    check_settings(output, "recordings.json", {**transfer.settings(), **models})
    tokens = trackable_tokens(transfer.model, transfer.batches(transfer.model), len(transfer.tokenizer), args.site)
    print(f"credit by token: {len(tokens)} of {len(transfer.tokenizer)} tokens are tracked", flush=True)

    def recorded(stage: Stage) -> MassActivation:
        path = output / "mass" / stage.path / f"{args.site}.safetensors"
        if not path.is_file():
            model, digest = transfer.load(stage), vocabulary_digest(transfer.tokenizer)
            record_mass(model, transfer.batches(model), args.site, token_ids=tokens, vocabulary=digest).save(path)
        return MassActivation.load(path)

    done = [stage for stage in transfer.stages() if transfer.is_done(stage)]
    scores = collect(transfer.directory)["rows"]
    rows = [row for stage in done for row in mass_prediction.add_features(scores, stage.about(), recorded(stage))]
    attribution = [row for stage in done if transfer.is_final(stage) for row in against_attribution(transfer, stage)]
    orders = ["/".join(order) for order in transfer.orders]
    growth = mass_prediction.growth_and_change(rows, orders)
    found = {
        "predictors": mass_prediction.predictors(mass_prediction.early_and_later(rows, orders), "later"),
        "growth": mass_prediction.growth_table(growth),
        "attribution": attribution,
        **draw(transfer, set(done), recorded, output / "figures", tagged),
    }
    print(*(f"{name}\n{table(lines)}\n" for name, lines in found.items()), sep="\n")
    about = {"arguments": vars(args), "settings": transfer_data.settings_of(*arguments)}
    print(f"wrote {write_results(output, {**found, 'rows': rows, 'steps': growth, **about})}")


def against_attribution(transfer: SequentialTransfer, stage: Stage) -> list[dict[str, Any]]:
    """Rank-correlate the mass of a model's neurons with the loss attributed to them."""
    model, validation = transfer.load(stage), transfer.data["validation"]
    options = {**transfer.convention(), "max_length": transfer.max_length, "measure": "attribution"}
    gradients = record_corpus(model, transfer.tokenizer, validation, **options)
    rows = mass_prediction.mass_against_attribution(record_mass(model, transfer.batches(model)), gradients)
    return [{**stage.about(), **row} for row in rows]


def draw(
    transfer: SequentialTransfer, done: set[Stage], recorded: Any, figures: Path, tagged: tuple | None
) -> dict[str, list[dict[str, Any]]]:
    """Draw the first order, seed 0, if it is done; return its tables, of changes and of parts of speech."""
    order = transfer.orders[0]
    steps = [Stage(SEQUENTIAL, 0, order[:step]) for step in range(1, len(order) + 1)]
    names = {"pre-trained": steps[0].start, **{f"+ {stage.trained[-1]}": stage for stage in steps}}
    if not done >= set(names.values()):
        return {}
    masses = {name: recorded(stage) for name, stage in names.items()}
    draw_steps(masses, order[0], transfer.tokenizer.convert_ids_to_tokens, figures)
    about = (*example_sentence(transfer.data["test"][order[-1]]), order[-1])
    attention = cross_attention(transfer.load(steps[-1]), transfer.tokenizer, *about, **transfer.convention())
    plot_attention(*attention, figures / "attention.svg", f"{order[-1]}, last decoder layer")
    found = {"changes": change_table(masses, order[0])}
    if tagged is not None:
        text, tags = tagged
        of_tags = {}
        for name, stage in {**names, "joint": Stage(JOINT, 0, tuple(transfer.language_pairs))}.items():
            if stage in done:
                model = transfer.load(stage)
                of_tags[name] = record_mass(model, transfer.batches(model, text, tags), stack="encoder", tags=tags)
        found["tags"] = tag_table(of_tags, order[0], transfer.batches(transfer.model, text, tags)[order[0]])
        plot_tag_shares(found["tags"], figures / "tags.svg")
    return found


if __name__ == "__main__":
    run(main)
