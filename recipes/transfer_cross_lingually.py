r"""Compare how well encoders transfer across languages: heads trained on one language, tested on every language.

python recipes/transfer_cross_lingually.py --config recipes/configs/transfer_cross_lingually/small.yaml \
    --data_dir data --models before=path/to/checkpoint after=path/to/another --output_dir build/transfer

mBART-50 before and after it was fine-tuned on translation:

python recipes/transfer_cross_lingually.py --config recipes/configs/transfer_cross_lingually/small.yaml \
    --config recipes/configs/transfer_cross_lingually/mbart50.yaml --data_dir data --output_dir build/transfer-mbart \
    --models before=facebook/mbart-large-50 after=facebook/mbart-large-50-many-to-many-mmt

The first model is the source of the others. A name that is given several times is one condition with several seeds,
cp=build/cp-0/model cp=build/cp-1/model. Every two conditions are compared, over items and over seeds: a difference
that only one of the two tests finds may be chance. Finished heads are not trained again, so that repeating a command
resumes it. Needs the extra `report` (scipy, matplotlib).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.seeds import compare as compare_seeds
from neuron_specialization.analysis.seeds import summarize as summarize_seeds
from neuron_specialization.analysis.transfer_plots import plot_transfer
from neuron_specialization.translation.arguments import as_mapping
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.encoder_heads import HeadTraining
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.transfer import FINE_TUNING, PROBING, named_checkpoints, transfer
from neuron_specialization.translation.transfer_statistics import (
    by_condition,
    compare,
    condition_values,
    language_table,
    language_values,
    score_rows,
    summarize,
    uninformative,
)
from neuron_specialization.translation.understanding import load_tasks


@dataclass
class TransferArguments:
    """Models, tasks, and how heads are trained."""

    output_dir: str = field(metadata={"help": "Where results.json and the predictions go."})
    models: list[str] = field(metadata={"help": "name=checkpoint, directories or Hub ids; the first is the source."})
    tasks: str = field(metadata={"help": "Tasks, described under `tasks:` in the configuration file (here as JSON)."})
    data_dir: str | None = field(default=None, metadata={"help": "Directory of the tasks' files."})
    source_language: str = field(default="en", metadata={"help": "Language to train on."})
    languages: list[str] = field(default_factory=list, metadata={"help": "Test on these only; by default on all."})
    apart: list[str] = field(default_factory=list, metadata={"help": "Languages reported apart, not in the means."})
    language_tokens: list[str] = field(default_factory=list, metadata={"help": "code=token, or code=token,token."})
    modes: list[str] = field(
        default_factory=lambda: [PROBING, FINE_TUNING],
        metadata={"help": "probing (the encoder is frozen) and fine_tuning."},
    )
    seeds: int = field(default=5, metadata={"help": "Heads per model, task and mode."})
    pooling: str = field(default="mean", metadata={"help": "How a text's states become one: mean or sum."})
    probing_epochs: float = field(default=20, metadata={"help": "Passes over the training data, probing."})
    probing_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate, probing."})
    fine_tuning_epochs: float = field(default=5, metadata={"help": "Passes over the training data, fine-tuning."})
    fine_tuning_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate, fine-tuning."})
    batch_size: int = field(default=32, metadata={"help": "Examples per update."})
    max_length: int = field(default=128, metadata={"help": "Text is truncated to this many tokens."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on this many, drawn at random."})
    max_test_items: int | None = field(
        default=None, metadata={"help": "Test on this many, the same in all languages."}
    )


def main() -> None:
    (args,) = parse(TransferArguments)
    check_single_process()
    check_figures()
    checkpoints, head = named_checkpoints(args.models), (args.batch_size, args.pooling)
    models = {each.label: each.location for each in checkpoints}
    known = {
        PROBING: HeadTraining(args.probing_epochs, args.probing_learning_rate, *head),
        FINE_TUNING: HeadTraining(args.fine_tuning_epochs, args.fine_tuning_learning_rate, *head),
    }
    if not args.modes or not known.keys() >= set(args.modes):
        raise ValueError(f"Expected --modes among {' and '.join(known)}, got {' '.join(args.modes)}.")
    training = {mode: known[mode] for mode in args.modes}
    limits = {"max_train_examples": args.max_train_examples, "max_test_items": args.max_test_items}
    places = {"directory": args.data_dir, "languages": args.languages, "apart": args.apart}
    tasks = load_tasks(json.loads(args.tasks), args.source_language, **places, **limits)
    options = {"language_tokens": as_mapping(args.language_tokens), "max_length": args.max_length}
    found = transfer(models, tasks, training, f"{args.output_dir}/predictions", seeds=args.seeds, **options)
    first = next(iter(models))
    results = {
        "rows": score_rows(tasks, found),
        "summary": summarize(tasks, found, args.apart),
        "comparisons": compare(tasks, by_condition(found, checkpoints), first, args.apart),
    }
    conditions = condition_values(results["summary"], checkpoints)
    results |= {"conditions": summarize_seeds(conditions), "condition_tests": compare_seeds(conditions, first)}
    results["languages"] = summarize_seeds(language_values(results["rows"], checkpoints))
    results["uninformative"] = uninformative(results["summary"], first)
    for task in tasks:
        for mode in training:
            print(f"{task.name}, {mode}: accuracy")
            print(table(language_table(task, results["rows"], mode)))
    columns = ("task", "mode", "model", "source", "zero_shot", "gap", "gap_interval", "seed_deviation", "apart")
    print(table([{name: row[name] for name in columns} for row in results["summary"]]))
    print(*(table(results[name]) for name in ("comparisons", "conditions", "condition_tests")), sep="\n\n")
    for task in results["uninformative"]:
        print(f"UNINFORMATIVE: {task['task']}, {task['mode']}: {task['reason']}.")
    print(f"wrote {write_results(args.output_dir, {**results, 'arguments': [dataclasses.asdict(args)]})}")
    if len({each.name for each in checkpoints}) > 1:
        figure = Path(args.output_dir) / "transfer.svg"
        print(f"wrote {plot_transfer(results['languages'], checkpoints[0].name, args.apart, figure)}")


if __name__ == "__main__":
    run(main)
