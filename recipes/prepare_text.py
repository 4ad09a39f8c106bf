r"""Gather the text of a continued pre-training run: monolingual lines to denoise, short parallel rows to translate.

python recipes/prepare_text.py --config recipes/configs/prepare_text/small.yaml --data_dir data --output_dir build/text

Writes monolingual/{train,validation}.{language} for pretrain.py --objective denoising, without what stands in the
held-out splits of any corpus, and parallel/{train,validation,test}.parquet for continue_pretraining.py.
"""

import json
from dataclasses import dataclass, field

from neuron_specialization.neurons.files import atomic_directory
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.text_preparation import describe_corpora, write_monolingual, write_parallel


@dataclass
class PrepareArguments:
    """The corpora, and how much of them is taken."""

    output_dir: str = field(metadata={"help": "Where the text and results.json go."})
    languages: list[str] = field(metadata={"help": "Languages to write."})
    corpora: str = field(
        metadata={
            "help": "Corpora under `corpora:` in the configuration file (here as JSON): name → file, text (column), "
            "languages and splits, where {language} and {split} stand for each."
        }
    )
    data_dir: str = field(default=".", metadata={"help": "Directory that paths of files start from."})
    parallel: str | None = field(
        default=None, metadata={"help": "Multi-parallel file, with {split} in its path and a column per language."}
    )
    max_characters: int | None = field(default=None, metadata={"help": "Leave out longer lines."})
    max_parallel_characters: int | None = field(
        default=None, metadata={"help": "Leave out parallel rows that are longer in any language."}
    )
    max_held_out: int | None = field(
        default=None, metadata={"help": "Rows of the parallel validation data, and of the test data."}
    )
    validation_lines: int = field(
        default=500, metadata={"help": "Lines per language set aside to validate denoising on."}
    )


def main() -> None:
    (args,) = parse(PrepareArguments)
    check_single_process()
    corpora = describe_corpora(json.loads(args.corpora))
    results = {}
    with atomic_directory(args.output_dir) as folder:
        for name in ("monolingual", "parallel") if args.parallel else ("monolingual",):
            (folder / name).mkdir()
        results["monolingual"] = write_monolingual(
            *(corpora, args.languages, args.data_dir, folder / "monolingual"),
            max_characters=args.max_characters,
            validation_lines=args.validation_lines,
        )
        if args.parallel:
            results["parallel"] = write_parallel(
                *(f"{args.data_dir}/{args.parallel}", args.languages, folder / "parallel"),
                max_characters=args.max_parallel_characters,
                max_held_out=args.max_held_out,
            )
        print(*(f"{name}\n{table(rows)}\n" for name, rows in results.items()), sep="\n")
        write_results(folder, {**results, "arguments": [vars(args)]})
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    run(main)
