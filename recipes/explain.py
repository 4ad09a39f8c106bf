r"""Do language pairs disturb each other, and which words do their neurons fire on?

python recipes/explain.py --config recipes/configs/explain/multi30k.yaml --gradients --tags \
    --model_name_or_path path/to/checkpoint --validation_file data/validation.parquet \
    --tagged_file "ud_pud/{lang}.parquet" --output_dir build/explained

--gradients   cosines of two directions' gradients per block, dense and under masks
--tags        parts of speech and sentence lengths that specialized neurons fire on; the tagged files have columns
              sent_id, tokens and upos (lists)

Masks are those of --adapter, without what it trained, or identified on the validation text.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis import gradients, tagged_activity
from neuron_specialization.analysis.figures import check_figures
from neuron_specialization.analysis.mask_plots import plot_gradients, plot_tags
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process, this_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.tagged_text import LENGTHS, by_length, load_tagged, tagged_batches
from neuron_specialization.translation.token_loss import scored_batches
from neuron_specialization.translation.tokenization import resolve_tokens

UNUSED = ("train_file", "test_file", "pivot", "train_sentences", "document_column", "drop_faulty")


@dataclass
class ExplainArguments:
    """What to explain."""

    output_dir: str = field(metadata={"help": "Where results.json and figures (SVG and PNG) go."})
    gradients: bool = field(default=False, metadata={"help": "Cosines of two directions' gradients."})
    tags: bool = field(default=False, metadata={"help": "Words that specialized neurons fire on."})
    k: float = field(default=0.7, metadata={"help": "Share of all activations that the kept neurons make up."})
    tagged_file: str | None = field(default=None, metadata={"help": "Tagged sentences, a file for each {lang}."})
    batch_size: int = field(default=64, metadata={"help": "Sentence pairs per batch; changes speed only."})


def main() -> None:
    args, where, data = parse(ExplainArguments, ModelArguments, DataArguments, unused=UNUSED)
    check_single_process()
    check_figures()
    if not args.gradients and not args.tags:
        raise ValueError("Say what to explain: --gradients, --tags, or both.")
    if args.tags and args.tagged_file is None:
        raise ValueError("--tags needs tagged sentences, such as --tagged_file 'ud_pud/{lang}.parquet'.")
    model, tokenizer = load_checkpoint(where.model_name_or_path)
    model.to(this_process().device)
    corpus = data.load("validation", max_sentences=data.max_sentences)
    tokens = resolve_tokens(tokenizer, corpus, data.tokens)
    convention = {"language_tokens": tokens, "source_tag": data.source_tag}
    if where.adapter is None:
        options = {"batch_size": args.batch_size, "max_length": data.max_length, **convention}
        masks = ns.CumulativeThreshold(args.k).select(ns.record_corpus(model, tokenizer, corpus, **options))
    else:
        masks = ns.NeuronMasks.from_pretrained(where.adapter)
    config = ns.NeuronSpecializationConfig(
        masks=masks, trainable="none", source_tag=data.source_tag, task_type="SEQ_2_SEQ_LM"
    )
    masked = get_peft_model(copy.deepcopy(model), config)
    results: dict[str, Any] = {"selector": masks.selector, "arguments": [vars(args), vars(where), vars(data)]}
    if args.gradients:
        results |= compare_gradients(args, {"dense": model, "masked": masked}, tokenizer, corpus, convention)
    if args.tags:
        results |= compare_words(args, data, model, tokenizer, tokens, masks)
    print(f"wrote {write_results(args.output_dir, results)}")


def compare_gradients(
    args: Any, models: dict[str, Any], tokenizer: Any, corpus: dict[str, Any], convention: dict[str, Any]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    cosines: dict[str, dict] = {scope: {} for scope in gradients.SCOPES}
    # the same sentences for every pair
    halves = [{pair: text.select(range(half, len(text), 2)) for pair, text in corpus.items()} for half in (0, 1)]
    for scope in gradients.SCOPES:
        for kind, model in models.items():
            both = []
            for half in halves:
                options = (*convention.values(), args.batch_size)
                batches = {p: scored_batches(model, tokenizer, p, text, *options) for p, text in half.items()}
                both.append(gradients.pair_gradients(model, batches, scope))
            found = gradients.gradient_cosines(*both)
            what = {"scope": scope, "model": kind}
            rows += [{**what, **row} for row in gradients.gradient_rows(found, list(corpus), model)]
            cosines[scope][kind] = {name: each.round(4).tolist() for name, each in found.items()}
    plot_gradients(rows, gradients.RELATIONS, Path(args.output_dir) / "gradients.svg")
    print(table(rows, without=["block"]))
    return {"gradients": rows, "cosines": cosines, "language_pairs": list(corpus)}


def compare_words(
    args: Any, data: Any, model: Any, tokenizer: Any, tokens: dict[str, str], masks: ns.NeuronMasks
) -> dict[str, Any]:
    sentences = load_tagged(args.tagged_file, list(tokens), data.max_sentences)
    parts = sorted({tag for of in sentences.values() for each in of.values() for tag in each.tags} - {"X", "_"})
    lengths = {code: by_length(of) for code, of in sentences.items()}
    rows: list[dict[str, Any]] = []
    each: dict[str, Any] = {}
    for kind, tagged, names in (("part of speech", sentences, parts), ("length", lengths, list(LENGTHS))):
        options = (names, tokens, data.max_length, args.batch_size)
        batches = tagged_batches(model, tokenizer, tagged, data.language_pairs, *options)
        each[kind] = tagged_activity.tag_rows(tagged_activity.record_tagged(model, batches, names), masks)
        rows += [{"tags": kind, **row} for row in tagged_activity.mean_rows(each[kind])]
        plot_tags(each[kind], names, Path(args.output_dir) / f"tags-{kind.replace(' ', '-')}.svg")
    print(table(rows, without=["block"]))
    return {"words": rows, "words by pair": each, "sentences": len(sentences[next(iter(tokens))])}


if __name__ == "__main__":
    run(main)
