r"""Score a model on test data: BLEU and chrF++ with signatures, per direction and averaged.

accelerate launch --quiet recipes/score.py --config recipes/configs/score/multi30k.yaml \
    --model_name_or_path path/to/checkpoint --adapter build/specialized/adapter \
    --test_file data/test.parquet --output_dir build/scores

With --spectrum_of SOURCE, of a model that has the singular values of another checkpoint: is the spectrum what made the
difference? The model is saved too, so that transfer_cross_lingually.py can test it.
"""

import time
from dataclasses import dataclass, field

from neuron_specialization.analysis.spectrum import with_spectrum_of
from neuron_specialization.neurons.adapter_file import digest_of_weights
from neuron_specialization.neurons.files import atomic_directory, check_replaceable
from neuron_specialization.neurons.language_pairs import split_pair
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_adapted, load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.evaluation import check_scorers, evaluate, score_rows
from neuron_specialization.translation.long_sentences import LongSentences
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.results import table, write_results
from neuron_specialization.translation.text_files import one_line
from neuron_specialization.translation.translate import note_composed

UNUSED = ("train_file", "validation_file", "max_length", "train_sentences", "document_column", "drop_faulty")


@dataclass
class ScoreArguments:
    """How to translate."""

    output_dir: str = field(metadata={"help": "Where results.json and the translations go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace files of the same names that this package did not write."}
    )
    spectrum_of: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint whose singular values are put under the model's singular vectors before scoring; the "
            "resulting model is saved in output_dir/model."
        },
    )
    num_beams: int = field(default=5, metadata={"help": "Beams."})
    batch_size: int = field(default=64, metadata={"help": "Sentences per batch; changes speed only."})
    long_sentences: LongSentences = field(
        default="error",
        metadata={"help": "What to do with sentences of more tokens than the model has positions."},
    )


def main() -> None:
    args, where, data = parse(ScoreArguments, ModelArguments, DataArguments, unused=UNUSED)
    files = ("results.json", *(f"translations/{pair}.txt" for pair in data.language_pairs))
    check_replaceable(args.output_dir, files, args.overwrite_output_dir)
    test = data.load("test", max_sentences=data.max_sentences)
    check_scorers(split_pair(pair)[1] for pair in test)
    model, tokenizer = load_adapted(where.model_name_or_path, where.adapter)
    note_composed(model, test)
    if args.spectrum_of is not None:
        model = with_spectrum_of(model, load_checkpoint(args.spectrum_of)[0])
    started = time.perf_counter()
    result = evaluate(
        model.to(this_process().device),
        tokenizer,
        test,
        pivot=data.pivot,
        language_tokens=data.tokens,
        source_tag=data.source_tag,
        batch_size=args.batch_size,
        num_beams=args.num_beams,
        long_sentences=args.long_sentences,
    )
    seconds = time.perf_counter() - started
    if not this_process().is_main_process:
        return
    print(table(score_rows(result)))
    digest = None if where.adapter is None else digest_of_weights(where.adapter)
    settings = {"seconds": seconds, "arguments": [vars(args), vars(where), vars(data)], "adapter_digest": digest}
    translations = result.pop("translations")
    with atomic_directory(args.output_dir, args.overwrite_output_dir) as folder:
        (folder / "translations").mkdir()
        if args.spectrum_of is not None:
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
        for pair, texts in translations.items():
            lines = "".join(f"{one_line(text)}\n" for text in texts)
            (folder / "translations" / f"{pair}.txt").write_text(lines, encoding="utf-8")
        write_results(folder, {**result, **settings})
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    run(main)
