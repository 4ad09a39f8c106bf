r"""One pair as a smaller plain model: a transformers checkpoint and, with --quantization, a CTranslate2 model.

accelerate launch --quiet recipes/export.py \
    --model_name_or_path path/to/checkpoint --adapter build/specialized/adapter --pair en-de \
    --test_file data/test.parquet --language_tokens en=eng_Latn de=deu_Latn --output_dir build/en-de \
    --quantization int8
"""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import neuron_specialization as ns
from neuron_specialization.export import ctranslate2
from neuron_specialization.export.compaction import save_compact
from neuron_specialization.export.vocabulary import check_trimmable, trim_vocabulary, unknown_rate
from neuron_specialization.neurons.adapter_file import PREFIX
from neuron_specialization.neurons.files import atomic_directory, check_not_input, check_replaceable, remove_written
from neuron_specialization.neurons.language_pairs import split_pair
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_adapted, load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.evaluation import check_scorers
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.translate import note_composed
from neuron_specialization.translation.verification import Verification

UNUSED = "language_pairs train_file validation_file source_tag pivot max_length max_sentences drop_faulty".split()
UNUSED += ["train_sentences", "document_column"]
FILES = ("results.json", "checkpoint/config.json", "ctranslate2/model.bin")


@dataclass
class ExportArguments:
    """What to export, and how to check it."""

    pair: str = field(metadata={"help": "Direction to keep, such as en-de."})
    output_dir: str = field(metadata={"help": "Where the models and results.json go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace files of the same names that this package did not write."}
    )
    trim_vocabulary: str | None = field(default=None, metadata={"help": "Keep the tokens of this parallel text only."})
    quantization: str | None = field(default=None, metadata={"help": "Also write a CTranslate2 model: int8, ..."})
    num_beams: int = field(default=5, metadata={"help": "Beams of the verification."})
    sample: int = field(default=100, metadata={"help": "Test sentences to verify on."})


def main() -> None:
    args, where, data = parse(ExportArguments, ModelArguments, DataArguments, unused=UNUSED)
    if where.adapter is None:
        raise ValueError("Pass the adapter whose pair to export: --adapter DIRECTORY or Hub id.")
    if not this_process().is_main_process:
        return  # one pair is the work of one process
    output = Path(args.output_dir)
    check_scorers([split_pair(args.pair)[1]])
    check_not_input(output / "checkpoint", where.model_name_or_path)
    check_replaceable(output, FILES, args.overwrite_output_dir)
    data.language_pairs = [args.pair]
    sample = data.load("test", max_sentences=args.sample)[args.pair]
    model, tokenizer = load_adapted(where.model_name_or_path, where.adapter)
    note_composed(model, [args.pair])
    small = ns.compact(model, args.pair)
    if args.quantization:
        ctranslate2.check_convertible(small, args.quantization)
    if args.trim_vocabulary:
        check_trimmable(tokenizer)
    adapted = Verification(model, tokenizer, args.pair, sample, data.tokens, args.num_beams)
    base = [parameter for name, parameter in model.named_parameters() if PREFIX not in name]
    rows = [adapted.row("base under the adapter", base, None, tokenizer, adapted.translations)]
    vocabulary: dict = {}
    if args.trim_vocabulary:
        small, tokenizer, vocabulary = trim(small, tokenizer, adapted, args.trim_vocabulary, data.column_names)
    # an earlier export, maybe of another pair
    remove_written(output / "ctranslate2")
    (output / "results.json").unlink(missing_ok=True)
    rows.append(export_checkpoint(small, tokenizer, adapted, args))
    if not args.trim_vocabulary and rows[-1]["identical"] < 1:
        print("The checkpoint translates some sentences differently; that is expected only of near ties.")
    if args.quantization:
        rows.append(export_ctranslate2(small, tokenizer, adapted, args))
    print(table(rows))
    arguments = [vars(args), vars(where), vars(data)]
    results = {"exports": rows, "vocabulary": vocabulary, "sentences": len(sample), "arguments": arguments}
    with atomic_directory(output, args.overwrite_output_dir) as folder:
        write_results(folder, {"pair": args.pair, **results})
    print(f"wrote {output / 'results.json'}")


def trim(model, tokenizer, adapted: Verification, path: str, columns: dict[str, str]) -> tuple:
    """Cut the vocabulary to that of a text; print and return how much that leaves unknown of the test sentences."""
    text = load_parallel(path, [adapted.pair], split="train", columns=columns)[adapted.pair]
    sentences = chain(text["source"], text["target"])
    small, trimmed, cut = trim_vocabulary(model, tokenizer, sentences, list(adapted.tokens.values()))
    unknown = unknown_rate(tokenizer, trimmed, adapted.sources + adapted.references)
    print(f"vocabulary: {cut.before} -> {cut.after} tokens; {unknown:.2%} of the sample's tokens are now unknown")
    return small, trimmed, {"before": cut.before, "after": cut.after, "unknown rate": unknown}


def export_checkpoint(small, tokenizer, adapted: Verification, args: ExportArguments) -> dict:
    """Write the checkpoint, and verify what transformers loads from it."""
    directory = Path(args.output_dir, "checkpoint")
    padded = save_compact(small, directory, tokenizer, args.overwrite_output_dir)
    found = adapted.translate(*load_checkpoint(str(directory)))
    return adapted.row("checkpoint", padded.parameters(), directory, tokenizer, found)


def export_ctranslate2(small, tokenizer, adapted: Verification, args: ExportArguments) -> dict:
    """Write the CTranslate2 model, and verify it."""
    directory = Path(args.output_dir, "ctranslate2")
    ctranslate2.save_ctranslate2(small, tokenizer, directory, args.quantization, args.overwrite_output_dir)
    longest = getattr(small.config, "max_position_embeddings", 256) - 1
    limits = {"num_beams": args.num_beams, "max_length": min(longest, small.generation_config.max_length or longest)}
    inputs = ctranslate2.load_ctranslate2(directory), tokenizer, adapted.input_ids(tokenizer)
    found = ctranslate2.translate_ctranslate2(*inputs, adapted.target_token, **limits)
    return adapted.row(f"CTranslate2 {args.quantization}", small.parameters(), directory, tokenizer, found)


if __name__ == "__main__":
    run(main)
