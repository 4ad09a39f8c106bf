"""Write artificial related languages as parallel text, train.jsonl, validation.jsonl and test.jsonl, and how far apart
they are, distances.csv.

python recipes/toy_data.py --config recipes/configs/toy_data/toy-control.yaml --output_dir build/toy
"""

import csv
from dataclasses import dataclass, field
from itertools import combinations

from datasets import disable_progress_bars

from neuron_specialization.neurons.files import atomic_directory
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.toy import ToyLanguages


@dataclass
class ToyArguments:
    """The languages, and how many sentences."""

    output_dir: str = field(metadata={"help": "Directory of the four files."})
    families: int = field(default=2, metadata={"help": "Language families."})
    languages_per_family: int = field(default=3, metadata={"help": "Languages in each."})
    replaced: float = field(default=0.15, metadata={"help": "Share of roots that a language replaces by its own."})
    roots: int = field(default=44, metadata={"help": "Roots in each language, a multiple of 11."})
    sentences: int = field(default=4000, metadata={"help": "Training sentences, in every language."})
    held_out: int = field(default=200, metadata={"help": "Validation sentences, and as many test sentences."})
    seed: int = field(default=0, metadata={"help": "Everything drawn depends on it."})


def main() -> None:
    (args,) = parse(ToyArguments)
    check_single_process()
    disable_progress_bars()
    toy = ToyLanguages(args.families, args.languages_per_family, args.seed, args.replaced, args.roots)
    with atomic_directory(args.output_dir) as folder:
        toy.write(folder, args.sentences, args.held_out)
        with (folder / "distances.csv").open("w", newline="", encoding="utf-8") as file:
            rows = ((a, b, toy.distance(a, b)) for a, b in combinations(toy.languages, 2))
            csv.writer(file).writerows([("a", "b", "distance"), *rows])
    print(f"wrote {args.output_dir}; --language_pairs {' '.join(toy.language_pairs)}")


if __name__ == "__main__":
    run(main)
