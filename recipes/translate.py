r"""Translate a text file: one line out per line in. After an interruption, the same command continues.

accelerate launch --quiet recipes/translate.py \
    --model_name_or_path path/to/checkpoint --adapter build/specialized/adapter --pair en-de \
    --input sentences.en --output sentences.de
"""

from dataclasses import dataclass, field

from neuron_specialization.translation.arguments import ModelArguments, as_mapping
from neuron_specialization.translation.checkpoints import load_adapted
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.long_sentences import LongSentences
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.text_files import (
    LineWriter,
    line_digest,
    read_lines,
    translate_lines,
    weights_of,
)
from neuron_specialization.translation.translate import check_long_sentences, note_composed


@dataclass
class TranslateArguments:
    """What to translate."""

    pair: str = field(metadata={"help": "Direction, such as en-de."})
    input: str = field(default="-", metadata={"help": "UTF-8 text file to read, or - for standard input."})
    output: str = field(default="-", metadata={"help": "File to write, or - for standard output."})
    language_tokens: list[str] = field(
        default_factory=list, metadata={"help": "Language tokens as code=token, such as de=deu_Latn."}
    )
    source_tag: str = field(
        default="source", metadata={"help": "Language that the tag on the source side names: source or target."}
    )
    num_beams: int = field(default=5, metadata={"help": "Number of beams."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per batch; changes speed only."})
    long_sentences: LongSentences = field(
        default="error",
        metadata={"help": "What to do with sentences of more tokens than the model has positions."},
    )


def main() -> None:
    args, where = parse(TranslateArguments, ModelArguments)
    lines = read_lines(args.input)
    settings = {**vars(args), **vars(where)}
    del settings["output"], settings["batch_size"]
    weights = {"weights": weights_of(where.model_name_or_path), "adapter_weights": weights_of(where.adapter)}
    with LineWriter(args.output, {**settings, **weights, "input": line_digest(lines)}) as output:
        model, tokenizer = load_adapted(where.model_name_or_path, where.adapter)
        model.to(this_process().device)
        note_composed(model, [args.pair])
        if args.long_sentences == "error":  # now, not after hours of translating
            check_long_sentences(model, tokenizer, lines, args.pair, as_mapping(args.language_tokens), args.source_tag)
        translations = translate_lines(
            model,
            tokenizer,
            lines,
            args.pair,
            done=output.done,
            language_tokens=as_mapping(args.language_tokens),
            source_tag=args.source_tag,
            batch_size=args.batch_size,
            num_beams=args.num_beams,
            long_sentences=args.long_sentences,
        )
        for some in translations:
            output.write(some)


if __name__ == "__main__":
    run(main)
