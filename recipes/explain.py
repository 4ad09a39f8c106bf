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
from neuron_specialization.translation.tagged_text import LENGTHS, by_length, check_fast, load_tagged, tagged_batches
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
    if args.tags and data.source_tag == "target":
        raise ValueError(
            "--tags needs a tokenizer that tags source and target itself, as NLLB's, M2M100's and mBART's."
        )
    model, tokenizer = load_checkpoint(where.model_name_or_path)
    tokens = resolve_tokens(tokenizer, data.language_pairs, data.tokens, data.source_tag)
    if args.tags:  # before anything is recorded
        check_fast(tokenizer)
        sentences = load_tagged(args.tagged_file, list(tokens), data.max_sentences)
    model.to(this_process().device)
    corpus = data.load("validation", max_sentences=data.max_sentences)
    convention = {"language_tokens": tokens, "source_tag": data.source_tag}
    if where.adapter is None:
        options = {"batch_size": args.batch_size, "max_length": data.max_length, **convention}
        masks = ns.CumulativeThreshold(args.k).select(ns.record_corpus(model, tokenizer, corpus, **options))
    else:
        masks = ns.NeuronMasks.from_pretrained(where.adapter)
        tagged_activity.check_blocks(model, masks)
    results = {"selector": masks.selector, "arguments": [vars(args), vars(where), vars(data)]}
    if args.gradients:
        config = {"trainable": "none", "source_tag": data.source_tag, "task_type": "SEQ_2_SEQ_LM"}
        masked = get_peft_model(copy.deepcopy(model), ns.NeuronSpecializationConfig(masks=masks, **config))
        results |= compare_gradients(args, {"dense": model, "masked": masked}, tokenizer, corpus, convention)
    if args.tags:
        results |= compare_words(args, data, model, tokenizer, tokens, masks, sentences)
    print(f"wrote {write_results(args.output_dir, results)}")


def compare_gradients(
    args: Any, models: dict[str, Any], tokenizer: Any, corpus: dict[str, Any], convention: dict[str, Any]
) -> dict[str, Any]:
    rows, cosines = [], {scope: {} for scope in gradients.SCOPES}
    # the same sentences for every pair
    halves = [{pair: text.select(range(half, len(text), 2)) for pair, text in corpus.items()} for half in (0, 1)]

    def gradients_of(model: Any, half: dict[str, Any], scope: str) -> gradients.Gradients:
        options = (*convention.values(), args.batch_size)
        batches = {pair: scored_batches(model, tokenizer, pair, text, *options) for pair, text in half.items()}
        return gradients.pair_gradients(model, batches, scope)

    for scope in gradients.SCOPES:
        for kind, model in models.items():
            found = gradients.gradient_cosines(*(gradients_of(model, half, scope) for half in halves))
            blocks = gradients.gradient_rows(found, list(corpus), model)
            rows += [{"scope": scope, "model": kind, **block} for block in blocks]
            cosines[scope][kind] = {name: each.round(4).tolist() for name, each in found.items()}
    plot_gradients(rows, gradients.RELATIONS, Path(args.output_dir) / "gradients.svg")
    print(table(rows, without=["block"]))
    return {"gradients": rows, "cosines": cosines, "language_pairs": list(corpus)}


def compare_words(
    args: Any, data: Any, model: Any, tokenizer: Any, tokens: dict[str, str], masks: ns.NeuronMasks, sentences: Any
) -> dict[str, Any]:
    parts = sorted({tag for of in sentences.values() for each in of.values() for tag in each.tags} - {"X", "_"})
    lengths = {code: by_length(of) for code, of in sentences.items()}
    rows, by_pair, limits = [], {}, (data.max_length, args.batch_size)
    for kind, tagged, names in (("part of speech", sentences, parts), ("length", lengths, list(LENGTHS))):
        batches = tagged_batches(model, tokenizer, tagged, data.language_pairs, names, tokens, *limits)
        by_pair[kind] = tagged_activity.tag_rows(tagged_activity.record_tagged(model, batches, names), masks)
        rows += [{"tags": kind, **row} for row in tagged_activity.mean_rows(by_pair[kind])]
        plot_tags(by_pair[kind], names, Path(args.output_dir) / f"tags-{kind.replace(' ', '-')}.svg")
    print(table(rows, without=["block"]))
    return {"words": rows, "words by pair": by_pair, "sentences": len(sentences[next(iter(tokens))])}


if __name__ == "__main__":
    run(main)
