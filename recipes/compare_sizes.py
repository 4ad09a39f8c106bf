r"""The picture over models of several sizes: a method's difference against the measured interference.

python recipes/compare_sizes.py --directories build/ladder/32 build/ladder/64 build/ladder/128 \
    --output_dir build/ladder

Each directory is the output of `compare_methods`, with the methods `bilingual`, `fine_tune` and those to draw; its
name says the size. There is one point per direction and size, and one panel per method, so that a method stands beside
its control.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from neuron_specialization.analysis.comparison_tables import sizes_table, usable_rows
from neuron_specialization.analysis.plots import plot_interference_of_sizes
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results


@dataclass
class SizesArguments:
    """Which comparisons to put together."""

    directories: list[str] = field(metadata={"help": "Directories with results.json, in the order of their sizes."})
    output_dir: str = field(metadata={"help": "Where to write the figure and the rows."})
    methods: list[str] = field(
        default_factory=lambda: ["ours", "random_overlap"], metadata={"help": "A panel for each of these."}
    )


def main() -> None:
    (args,) = parse(SizesArguments)
    check_single_process()
    rows: dict[str, list] = {}
    if len({Path(directory).name for directory in args.directories}) < len(args.directories):
        raise ValueError(f"Expected directories named after the sizes, got {' '.join(args.directories)}.")
    for directory in map(Path, args.directories):
        path = directory / "results.json"
        if not path.is_file():
            raise ValueError(f"There is no {path}: run compare_methods with --tables_only true first.")
        found = json.loads(path.read_text(encoding="utf-8"))
        rows[directory.name] = usable_rows(found["rows"], found["stages"])
        missing = {"fine_tune", "bilingual"} - {row["method"] for row in rows[directory.name]}
        if missing:
            raise ValueError(
                f"{path} has no rows of {', '.join(sorted(missing))}: interference is not measured there."
            )
    known = {row["method"] for of in rows.values() for row in of}
    if absent := [method for method in args.methods if method not in known]:
        raise ValueError(f"No comparison has rows of {absent[0]!r}; they have {', '.join(sorted(known))}.")
    summary = sizes_table(rows, args.methods)
    print(table(summary))
    figure = plot_interference_of_sizes(rows, args.methods, Path(args.output_dir) / "interference.svg")
    all_rows = [{"size": size, **row} for size, of in rows.items() for row in of]
    print(f"wrote {figure} and {write_results(args.output_dir, {'rows': all_rows, 'summary': summary})}")


if __name__ == "__main__":
    run(main)
