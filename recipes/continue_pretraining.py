r"""Continue a checkpoint's pre-training on translation, dense or under masks; or on denoising, as the control.

accelerate launch --quiet recipes/continue_pretraining.py --config recipes/configs/continue_pretraining/small.yaml \
    --model_name_or_path build/denoised/model --train_file data/train.parquet \
    --validation_file data/validation.parquet --test_file data/test.parquet --output_dir build/cp-mt

The control denoises the target side of the same batches, so both train on the same target tokens, in the same order
(same seed, batch sizes and updates; `target_tokens` says how many):

accelerate launch --quiet recipes/continue_pretraining.py --config recipes/configs/continue_pretraining/small.yaml \
    --objective denoising --model_name_or_path build/denoised/model --train_file data/train.parquet \
    --validation_file data/validation.parquet --test_file data/test.parquet --output_dir build/cp-denoise

A public checkpoint, with its own language tokens:

accelerate launch --quiet recipes/continue_pretraining.py --model_name_or_path facebook/mbart-large-50 \
    --language_pairs en-de de-en --language_tokens en=en_XX de=de_DE --pivot en --max_steps 10000 \
    --train_file data/train.parquet --validation_file data/validation.parquet --test_file data/test.parquet \
    --output_dir build/cp-mbart50

--language_pairs decides on one-to-many (en-de en-fr), many-to-one (de-en fr-en) or many-to-many. --alignment 0.1 also
aligns the encoder's states of translations, token by token (the formula is in translation/alignment.py). Each run ends
at its own best validation loss, after the updates that results.json calls `best_step`.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import get_peft_model
from transformers import set_seed

import neuron_specialization as ns
from neuron_specialization.neurons.files import check_not_input
from neuron_specialization.neurons.language_pairs import split_pair
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.denoising import ObjectiveArguments
from neuron_specialization.translation.encoding import text_digest
from neuron_specialization.translation.evaluation import check_lengths, check_scorers, evaluate, score_rows
from neuron_specialization.translation.results import has_scores, report_training, table
from neuron_specialization.translation.tokenization import resolve_tokens
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit


@dataclass
class ContinueArguments:
    """The masks to train under, and how translations are scored afterwards."""

    masks: str = field(default="none", metadata={"help": "Adapter directory or Hub id with masks, or none: dense."})
    alignment: float = field(
        default=0.0,
        metadata={"help": "Weight of the token-alignment loss on encoder states (dense only)."},
    )
    num_beams: int = field(default=5, metadata={"help": "Beams."})


def main() -> None:
    args, objective, where, data, training = parse(
        *(ContinueArguments, ObjectiveArguments, ModelArguments, DataArguments, SpecializationTrainingArguments),
        unused=("adapter",),
    )
    check(args, objective, data, training)
    set_seed(training.seed)
    test = data.load("test")
    train, validation, checked = data.load_checked()
    if training.process_index == 0:
        print(table(checked))
    model, tokenizer = load_checkpoint(where.model_name_or_path, "float32")
    tokens = resolve_tokens(tokenizer, data.language_pairs, data.tokens, data.source_tag)
    tags: dict[str, Any] = {"language_tokens": tokens, "source_tag": data.source_tag}
    check_scorers(split_pair(pair)[1] for pair in test)
    check_lengths(model, tokenizer, test, **tags)
    noise = objective.noise(tokenizer)
    if args.masks != "none":
        ids = ns.language_token_ids(tokenizer, tokens)
        settings = {"trainable": "full", "language_token_ids": ids, "source_tag": data.source_tag}
        config = ns.NeuronSpecializationConfig(masks=args.masks, **settings, task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, config)
    options: dict[str, Any] = {"max_length": data.max_length, "noise": noise, "alignment": args.alignment}
    scored = {"test": text_digest(test), "pivot": data.pivot, "num_beams": args.num_beams}
    metrics = fit(model, tokenizer, train, validation, training, **tags, **options)
    if not (metrics["finished_before"] and has_scores(training.output_dir, scored)):
        metrics["finished_before"] = False  # what stands there has no scores yet, or others
        batch_size = training.per_device_eval_batch_size
        scores = evaluate(
            *(model, tokenizer, test), pivot=data.pivot, **tags, batch_size=batch_size, num_beams=args.num_beams
        )
        del scores["translations"]
        metrics["scores"] = {**scores, "of": scored}
        if training.process_index == 0:
            print(table(score_rows(scores)))
    report_training(training.output_dir, metrics, checked, args, objective, where, data, training)


def check(args: Any, objective: Any, data: Any, training: Any) -> None:
    """Refuse what does not fit together before anything is loaded."""
    objective.check(data.language_pairs, data.source_tag)
    copies = [pair for pair in data.language_pairs if len(set(split_pair(pair))) == 1]
    if copies:
        raise ValueError(
            f"{', '.join(copies)}: expected the language pairs of the translation that the run does, or that its "
            "control is compared with; pretrain.py takes monolingual text."
        )
    settings = (args.masks, objective.objective, data.source_tag)
    if args.alignment and settings != ("none", "translation", "source"):
        raise ValueError(
            "--alignment compares the encoder's states of two languages: it needs --objective translation, --masks "
            "none and --source_tag source."
        )
    check_not_input(f"{training.output_dir}/adapter", args.masks)
    if training.overwrite_output_dir:
        check_not_input(training.output_dir, args.masks, contents=True)


if __name__ == "__main__":
    run(main)
