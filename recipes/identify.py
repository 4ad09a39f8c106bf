r"""Find the neurons that each language pair uses: an adapter directory with their masks, and the activation counts.

accelerate launch --quiet recipes/identify.py --config recipes/configs/identify/multi30k.yaml \
    --model_name_or_path path/to/checkpoint --validation_file data/validation.parquet \
    --output_dir build/masks --stability true
"""

import time
from dataclasses import dataclass, field, replace
from typing import Literal

import neuron_specialization as ns
from neuron_specialization.analysis.figures import can_draw
from neuron_specialization.analysis.mask_plots import plot_pairs
from neuron_specialization.analysis.report import write_report
from neuron_specialization.export.hub import facts_from_results
from neuron_specialization.neurons.adapter_file import CONFIG_NAME, WEIGHTS_NAME, check_holds_no_model
from neuron_specialization.neurons.card import describe_adapter
from neuron_specialization.neurons.card_sections import CardFacts
from neuron_specialization.neurons.extras import install
from neuron_specialization.neurons.files import atomic_directory, check_not_input, check_replaceable
from neuron_specialization.neurons.selector_description import RANDOM_WEIGHTS_SEED
from neuron_specialization.neurons.stability import stability
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_adapted, untrained_model
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.identification import record_corpus_parts
from neuron_specialization.translation.mask_report import report_kept, report_overlap, report_stability
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.smallest_k import find_smallest_k, parse_k

UNUSED = ("train_file", "test_file", "pivot", "train_sentences", "document_column", "drop_faulty")
FILES = (CONFIG_NAME, WEIGHTS_NAME, "counts.safetensors", "results.json", "overlap.svg", "overlap.png")


@dataclass
class IdentifyArguments:
    """How neurons are selected."""

    output_dir: str = field(metadata={"help": "Adapter directory to write."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace files of the same names that this package did not write."}
    )
    k: str = field(
        default="0.95",
        metadata={"help": "Share of activations that the kept neurons make up, or auto (0.5 then is 'at most 0.5')."},
    )
    encoder_k: float | None = field(default=None, metadata={"help": "Another share for the encoder."})
    decoder_k: float | None = field(default=None, metadata={"help": "Another share for the decoder."})
    measure: Literal["activity", "attribution"] = field(
        default="activity",
        metadata={"help": "Count where a neuron is active, or sum |activation x gradient of the loss|."},
    )
    count_padding: bool = field(default=False, metadata={"help": "Count padding too, as the released code does."})
    untrained: bool = field(
        default=False, metadata={"help": "Draw the model's weights at random: the control for analyses of masks."}
    )
    report: str | None = field(default=None, metadata={"help": "HTML file that shows the masks and their overlap."})
    batch_size: int = field(default=64, metadata={"help": "Sentence pairs per batch; changes speed only."})
    stability: bool = field(default=False, metadata={"help": "Compare masks of halves and of growing samples."})
    parts: int = field(default=8, metadata={"help": "Parts that --stability splits the sample into."})
    seed: int = field(default=0, metadata={"help": "Of the random split into parts, and of random weights."})


def main() -> None:
    args, where, data = parse(IdentifyArguments, ModelArguments, DataArguments, unused=UNUSED)
    if args.untrained and where.adapter is not None:
        raise ValueError("--untrained draws random weights, for which an --adapter has no meaning.")
    if args.stability and args.parts < 2:
        raise ValueError(f"--stability compares parts of the sample: --parts is 2 or more, got {args.parts}.")
    if args.count_padding and args.measure == "attribution":
        raise ValueError("--measure attribution has nothing to count of padding: leave --count_padding out.")
    k = parse_k(args.k)
    if k is None and (where.adapter or args.encoder_k or args.decoder_k):
        raise ValueError("--k auto looks for one k for both stacks of a model without adapter; leave the others out.")
    selector = ns.CumulativeThreshold(1.0 if k is None else k, args.encoder_k, args.decoder_k)
    check_not_input(args.output_dir, where.adapter)
    check_holds_no_model(args.output_dir)
    check_replaceable(args.output_dir, FILES, args.overwrite_output_dir)
    corpus = data.load("validation", max_sentences=data.max_sentences)
    model, tokenizer = load_adapted(where.model_name_or_path, where.adapter)
    if args.untrained:
        model = untrained_model(where.model_name_or_path, args.seed)
    options = {"language_tokens": data.tokens, "batch_size": args.batch_size, "max_length": data.max_length}
    recorded = {**options, "source_tag": data.source_tag, "count_padding": args.count_padding, "measure": args.measure}
    number = args.parts if args.stability else 1
    started = time.perf_counter()
    model.to(this_process().device)
    parts = record_corpus_parts(model, tokenizer, corpus, **recorded, parts=number, seed=args.seed)
    seconds = time.perf_counter() - started
    counts = parts[0].merge(*parts[1:])
    if not this_process().is_main_process:
        return
    masks, tried = selector.select(counts), {}
    if k is None:
        found = find_smallest_k(model, tokenizer, corpus, counts, **options)
        selector, masks, tried = ns.CumulativeThreshold(found.k), found.masks, {"tried": found.rows()}
        print(f"validation loss under masks, without training: k = {found.k}\n{table(found.rows())}")
    if args.untrained:
        masks = replace(masks, selector={**masks.selector, RANDOM_WEIGHTS_SEED: args.seed})
    results = {
        "kept": report_kept(masks),
        "overlap": report_overlap(masks),
        "tokens": {stack: t.tolist() for stack, t in counts.tokens.items()},
        "seconds": seconds,
        "selector": masks.selector,
        **tried,
        "arguments": [vars(args), vars(where), vars(data)],
    }
    if args.stability:
        results["stability"] = report_stability(stability(parts, selector))
    with atomic_directory(args.output_dir, args.overwrite_output_dir) as folder:
        masks.save_pretrained(folder, overwrite=True)  # the card that stands there came from output_dir
        counts.save(folder / "counts.safetensors")
        path = write_results(folder, results)
        describe_adapter(folder, facts_from_results(CardFacts(), identification=path))
        if can_draw():
            plot_pairs(results["overlap"], folder / "overlap.svg")
        else:
            print(f"no heatmap of the overlap: {install('report')}")
    if args.report is not None:
        print(f"wrote {write_report(args.report, 'Neurons of language pairs', masks, [args.output_dir])}")
    print(f"wrote {args.output_dir} ({seconds:.1f} s of recording)")


if __name__ == "__main__":
    run(main)
