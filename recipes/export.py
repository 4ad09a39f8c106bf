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
from neuron_specialization.adapter.active import active_config
from neuron_specialization.export import ctranslate2
from neuron_specialization.export.compaction import save_compact
from neuron_specialization.export.vocabulary import check_trimmable, trim_vocabulary, unknown_rate
from neuron_specialization.neurons.adapter_file import PREFIX
from neuron_specialization.neurons.files import atomic_directory, check_not_input, check_replaceable
from neuron_specialization.neurons.language_pairs import split_pair
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_adapted, load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.evaluation import check_scorers, score
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.text_files import weights_of
from neuron_specialization.translation.tokenization import encode
from neuron_specialization.translation.translate import pair_tokens, text_of, translate_tokens

UNUSED = "language_pairs train_file validation_file source_tag pivot max_length max_sentences drop_faulty".split()


FILES = ("results.json", "checkpoint/config.json", "ctranslate2/model.bin")


@dataclass
class ExportArguments:
    """What to export, and how to check it."""

    pair: str = field(metadata={"help": "Direction to keep, such as en-de."})
    output_dir: str = field(metadata={"help": "Where the models and results.json go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace files of the same names that this package did not write."}
    )
    trim_vocabulary: str | None = field(
        default=None, metadata={"help": "Keep only the tokens of this parallel text of the pair."}
    )
    quantization: str | None = field(default=None, metadata={"help": "Also write a CTranslate2 model: int8, ..."})
    num_beams: int = field(default=5, metadata={"help": "Beams of the verification."})
    sample: int = field(default=100, metadata={"help": "Test sentences to verify on."})


def main() -> None:
    args, where, data = parse(ExportArguments, ModelArguments, DataArguments, unused=UNUSED)
    if where.adapter is None:
        raise ValueError("Name the adapter whose pair to export: --adapter DIRECTORY or Hub id.")
    if not this_process().is_main_process:
        return  # one pair is the work of one process
    target = split_pair(args.pair)[1]
    check_scorers([target])
    output = Path(args.output_dir)
    check_not_input(output / "checkpoint", where.model_name_or_path)
    check_replaceable(output, FILES, args.overwrite_output_dir)
    data.language_pairs = [args.pair]
    sample = data.load("test", max_sentences=args.sample)[args.pair]
    sources, references = sample["source"][:], sample["target"][:]
    model, tokenizer = load_adapted(where.model_name_or_path, where.adapter)
    device = this_process().device
    small = ns.compact(model, args.pair)
    if args.quantization:
        ctranslate2.check_convertible(small, args.quantization)
    if args.trim_vocabulary:
        check_trimmable(tokenizer)
    tokens = pair_tokens(model, tokenizer, args.pair, data.tokens)
    source_tag = active_config(model).source_tag
    options = {"language_tokens": tokens, "source_tag": source_tag, "num_beams": args.num_beams}
    expected = translate_tokens(model.to(device), tokenizer, sources, args.pair, **options)
    base = [parameter for name, parameter in model.named_parameters() if PREFIX not in name]
    size = sum(parameter.nbytes for parameter in base)
    rows = [row("base under the adapter", base, size, tokenizer, expected, expected)]
    vocabulary = {}
    if args.trim_vocabulary:
        corpus = load_parallel(args.trim_vocabulary, [args.pair], split="train", columns=data.column_names)[args.pair]
        text = chain(corpus["source"], corpus["target"])
        small, trimmed, cut = trim_vocabulary(small, tokenizer, text, list(tokens.values()))
        unknown = unknown_rate(tokenizer, trimmed, sources + references)
        vocabulary = {"before": cut.before, "after": cut.after, "unknown rate": unknown}
        print(f"vocabulary: {cut.before} -> {cut.after} tokens; {unknown:.2%} of the sample's tokens are now unknown")
        tokenizer = trimmed
    directory = output / "checkpoint"
    padded = save_compact(small, directory, tokenizer, args.overwrite_output_dir)
    reloaded, tokenizer = load_checkpoint(str(directory))
    found = translate_tokens(reloaded.to(device), tokenizer, sources, args.pair, **options)
    rows.append(row("checkpoint", padded.parameters(), directory, tokenizer, found, expected))
    if not args.trim_vocabulary and found != expected:
        print("The checkpoint translates some sentences differently; that is expected only of near ties.")
    if args.quantization:
        directory = output / "ctranslate2"
        ctranslate2.save_ctranslate2(small, tokenizer, directory, args.quantization, args.overwrite_output_dir)
        longest = getattr(small.config, "max_position_embeddings", 256) - 1
        found = ctranslate2.translate_ctranslate2(
            ctranslate2.load_ctranslate2(directory),
            tokenizer,
            encode(tokenizer, args.pair, sources, None, tokens, source_tag)["input_ids"],
            tokens[target] if source_tag == "source" else None,
            num_beams=args.num_beams,
            max_length=min(longest, small.generation_config.max_length or longest),
        )
        name = f"CTranslate2 {args.quantization}"
        rows.append(row(name, small.parameters(), directory, tokenizer, found, expected))
    for entry in rows:
        entry["BLEU"] = score(entry.pop("translations"), references, target)["bleu"]
    print(table(rows))
    arguments = [vars(args), vars(where), vars(data)]
    results = {"exports": rows, "vocabulary": vocabulary, "sentences": len(sources), "arguments": arguments}
    with atomic_directory(output, args.overwrite_output_dir) as folder:
        write_results(folder, {"pair": args.pair, **results})
    print(f"wrote {output / 'results.json'}")


def row(name: str, parameters, where: Path | int, tokenizer, found: list, expected: list) -> dict:
    """Return one row of the report: sizes, and the share of translations whose tokens are the adapter's."""
    size = where if isinstance(where, int) else sum(size for size, _ in weights_of(where).values())
    same = sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)
    sizes = {"parameters": sum(parameter.numel() for parameter in parameters), "MB": size / 1e6}
    return {"export": name, **sizes, "identical": same, "translations": text_of(tokenizer, found)}


if __name__ == "__main__":
    run(main)
