r"""Are masks a property of a model and its languages, or an artifact? Identify them again, and see what stays.

python recipes/reidentify.py --config recipes/configs/reidentify/multi30k.yaml \
    --model_name_or_path path/to/checkpoint --validation_file data/validation.parquet \
    --train_file data/train.parquet --other_files bible=bible/validation.parquet \
    --comparison build/comparison --output_dir build/reidentified

Compared with the masks of the checkpoint on the validation text are those on training text, on --other_files, and
those of the models that `compare_methods` kept in --comparison: whatever is named.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import neuron_specialization as ns
from neuron_specialization.analysis.agreement import mask_agreement, mean_agreement
from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.mask_plots import plot_agreement
from neuron_specialization.baselines.kept import kept_models, kept_places
from neuron_specialization.translation.arguments import DataArguments, ModelArguments, as_mapping
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.identification import record_corpus, record_corpus_parts
from neuron_specialization.translation.processes import check_single_process, this_process
from neuron_specialization.translation.results import table, write_results

UNUSED = ("adapter", "test_file", "pivot", "train_sentences", "drop_faulty")


@dataclass
class ReidentifyArguments:
    """What is identified again."""

    output_dir: str = field(metadata={"help": "Where results.json and the figure (SVG and PNG) go."})
    k: float = field(default=0.7, metadata={"help": "Share of all activations that the kept neurons make up."})
    comparison: str | None = field(default=None, metadata={"help": "Output directory of compare_methods."})
    methods: list[str] = field(default_factory=lambda: ["fine_tune", "ours"], metadata={"help": "Methods in it."})
    other_files: list[str] = field(default_factory=list, metadata={"help": "name=text of another domain."})
    batch_size: int = field(default=64, metadata={"help": "Sentence pairs per batch; changes speed only."})


def main() -> None:
    args, where, data = parse(ReidentifyArguments, ModelArguments, DataArguments, unused=UNUSED)
    check_single_process()
    check_figures()
    kept = [] if args.comparison is None else kept_places(args.comparison, args.methods)
    others = dict(other_text(args, data))
    validation = data.load("validation", max_sentences=data.max_sentences)
    model, tokenizer = load_checkpoint(where.model_name_or_path)
    device = this_process().device
    selector = ns.CumulativeThreshold(args.k)
    convention = {"language_tokens": data.tokens, "source_tag": data.source_tag}
    options: dict[str, Any] = {**convention, "batch_size": args.batch_size, "max_length": data.max_length}
    halves = record_corpus_parts(model.to(device), tokenizer, validation, parts=2, **options)
    originals = selector.select(halves[0].merge(halves[1]))
    rows = named("half against half of the text", mask_agreement(*map(selector.select, halves)))

    def identify(name: str, again: Any, corpus: Any) -> None:
        masks = selector.select(record_corpus(again.to(device), tokenizer, corpus, **options))
        rows.extend(named(name, mask_agreement(originals, masks)))

    for name, corpus in others.items():
        identify(name, model, corpus)
    for name, again in kept_models(kept, where.model_name_or_path):
        identify(name, again, validation)
    averaged = mean_agreement(rows)
    print("IoU with the masks of the checkpoint on the validation text")
    print(table(averaged, without=["block"]))
    results = {"rows": averaged, "arguments": [vars(args), vars(where), vars(data)]}
    print(f"wrote {write_results(args.output_dir, results)}")
    plot_agreement(averaged, Path(args.output_dir) / "agreement.svg")


def named(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"masks": name, **row} for row in rows]


def other_text(args: ReidentifyArguments, data: DataArguments) -> Iterator[tuple[str, Any]]:
    """Yield the name and the corpora of other text, each direction as long as in the validation text."""
    if data.train_file is None and not args.other_files:
        return
    size = max(len(rows) for rows in data.load("validation", max_sentences=data.max_sentences).values())
    if data.train_file is not None:
        yield "training text", data.load("train", max_sentences=size)
    for name, path in as_mapping(args.other_files).items():
        yield f"text of {name}", replace(data, validation_file=path).load("validation", max_sentences=size)


if __name__ == "__main__":
    run(main)
