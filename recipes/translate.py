"""Translate a text file, one sentence per line.

accelerate launch --quiet recipes/translate.py \
    --model_name_or_path path/to/checkpoint --adapter build/specialized/adapter --pair en-de \
    --input sentences.en --output sentences.de
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import neuron_specialization as ns
from neuron_specialization.translation.arguments import ModelArguments, as_mapping
from neuron_specialization.translation.checkpoints import load_adapted
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import this_process


@dataclass
class TranslateArguments:
    """What to translate."""

    pair: str = field(metadata={"help": "Direction, such as en-de."})
    input: str = field(default="-", metadata={"help": "File to read, or - for standard input."})
    output: str = field(default="-", metadata={"help": "File to write, or - for standard output."})
    language_tokens: list[str] = field(default_factory=list, metadata={"help": "code=token, such as de=deu_Latn."})
    source_tag: str = field(default="source", metadata={"help": "What the source side's tag names: source or target."})
    num_beams: int = field(default=5, metadata={"help": "Beams."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per batch."})


def main() -> None:
    args, where = parse(TranslateArguments, ModelArguments)
    text = sys.stdin.read() if args.input == "-" else Path(args.input).read_text()
    model, tokenizer = load_adapted(where.model_name_or_path, where.adapter)
    translations = ns.translate(
        model.to(this_process().device),
        tokenizer,
        text.splitlines(),
        args.pair,
        language_tokens=as_mapping(args.language_tokens),
        source_tag=args.source_tag,
        batch_size=args.batch_size,
        num_beams=args.num_beams,
    )
    written = "".join(f"{' '.join(line.splitlines())}\n" for line in translations)
    if args.output == "-":
        sys.stdout.write(written)
    else:
        Path(args.output).write_text(written)


if __name__ == "__main__":
    run(main)
