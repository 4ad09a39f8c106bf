r"""What masks say about languages: the overlap of their neurons per layer, and whether it follows language distance.

python recipes/analyze.py --overlap --masks trained=build/masks untrained=build/masks-untrained --pivot en \
    --distances genetic --validation_file data/validation.parquet --tokenizer path/to/checkpoint \
    --output_dir build/overlap --report build/report.html --results build/scores

The untrained control is what `identify --untrained true` writes. The encoder is compared between directions into the
pivot, the decoder between those out of it. `--report` alone shows the first masks, and the results of other recipes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import neuron_specialization as ns
from neuron_specialization.analysis import distances
from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.mask_plots import plot_depth, plot_overlap
from neuron_specialization.analysis.overlap import overlap_rows, overlaps_by_stack
from neuron_specialization.analysis.report import write_report
from neuron_specialization.translation.arguments import DataArguments, as_mapping
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results

UNUSED = ("language_pairs", "train_file", "test_file", "max_length", "drop_faulty", "language_tokens", "source_tag")


@dataclass
class AnalyzeArguments:
    """What to analyze."""

    output_dir: str | None = field(default=None, metadata={"help": "Where --overlap writes its results and figures."})
    overlap: bool = field(default=False, metadata={"help": "Measure overlap of neurons against language distance."})
    report: str | None = field(default=None, metadata={"help": "HTML file to write, to be looked at in a browser."})
    results: list[str] = field(default_factory=list, metadata={"help": "Directories of other results to report."})
    masks: list[str] = field(
        default_factory=list, metadata={"help": "name=adapter directory or Hub id, such as trained=build/masks."}
    )
    distances: str = field(
        default="genetic",
        metadata={
            "help": f"{', '.join(distances.KINDS)} (URIEL), these after 'urielplus:', FILE.csv, or family (0/1)."
        },
    )
    families: list[str] = field(default_factory=list, metadata={"help": "code=family, where the table has none."})
    tiers: list[str] = field(
        default_factory=list, metadata={"help": "code=tier of training data, to control for; 'none' where left out."}
    )
    scripts: list[str] = field(default_factory=list, metadata={"help": "code=script, where the table has none."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Cuts the validation text: subword overlap is then regressed out too."}
    )
    permutations: int = field(default=9999, metadata={"help": "Draws of language labels in each Mantel test."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})


def main() -> None:
    args, data = parse(AnalyzeArguments, DataArguments, unused=UNUSED)
    check_single_process()
    if not args.overlap and args.report is None:
        raise ValueError("Say what to do: --overlap, --report FILE.html, or both.")
    masks = {name: ns.NeuronMasks.from_pretrained(place) for name, place in as_mapping(args.masks).items()}
    if args.overlap:
        check_figures()
        print(f"wrote {write_results(args.output_dir, compare_overlap(args, data, masks))}")
    if args.report is not None:
        directories = [*([args.output_dir] if args.overlap else []), *args.results]
        about = next(iter(masks.values()), None), directories, as_mapping(args.families)
        title = "Neurons of language pairs" if masks else "Results"
        title += f", masks {next(iter(masks))}" if len(masks) > 1 else ""
        print(f"wrote {write_report(args.report, title, *about)}")


def compare_overlap(args: AnalyzeArguments, data: DataArguments, masks: dict[str, ns.NeuronMasks]) -> dict[str, Any]:
    if not masks or data.pivot is None or args.output_dir is None:
        raise ValueError("--overlap needs --masks trained=build/masks, their --pivot, such as en, an --output_dir.")
    rows: list[dict[str, Any]] = []
    stacks: dict[str, Any] = {}
    found, left_out = overlaps_by_stack(masks, data.pivot)
    for why in left_out.values():
        print(why)
    for stack, overlaps in found.items():
        first = next(iter(overlaps.values()))
        about = compared(args, data, first.languages)
        plot_overlap(first, about["families"], Path(args.output_dir) / f"overlap-{stack}.svg")
        settings = (about["distances"], about["families"], about["controlled"], args.permutations, args.seed)
        for name, overlap in overlaps.items():
            rows += [{"masks": name, **row} for row in overlap_rows(overlap, *settings)]
        iou = {name: overlap.iou.round(4).tolist() for name, overlap in overlaps.items()}
        controlled = {name: values.round(4).tolist() for name, values in about["controlled"].items()}
        about |= {"distances": about["distances"].round(4).tolist(), "controlled": controlled}
        stacks[stack] = {"languages": first.languages, **about, "iou": iou}
    plot_depth(rows, Path(args.output_dir) / "overlap-depth.svg")
    print(table(rows, without=["block"]))
    selectors = {"selectors": {name: each.selector for name, each in masks.items()}}
    return {"overlap": rows, **stacks, **selectors, "arguments": [vars(args), vars(data)]}


def compared(args: AnalyzeArguments, data: DataArguments, codes: list[str]) -> dict[str, Any]:
    """Return the families, the distances, and the further distances to control for, of the languages compared."""
    controlled = distances.controlled_distances(codes, as_mapping(args.scripts), as_mapping(args.tiers))
    if args.tokenizer is not None:
        data.language_pairs = [f"{code}-{data.pivot}" for code in codes]
        text = data.load("validation", max_sentences=data.max_sentences)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        ids = [tokenizer(list(rows["source"]), add_special_tokens=False)["input_ids"] for rows in text.values()]
        controlled["subwords"] = distances.subword_distances([[i for row in each for i in row] for each in ids])
    about: dict[str, Any] = {
        "families": distances.families(codes, as_mapping(args.families)),
        "controlled": controlled,
    }
    if args.distances == "family":
        return {**about, "distances": distances.label_distances(about["families"])}
    return {**about, "distances": distances.load_distances(codes, args.distances)}


if __name__ == "__main__":
    run(main)
