r"""Train a multilingual baseline, from scratch or from a checkpoint, until the validation loss stops improving.

accelerate launch --quiet recipes/pretrain.py --config recipes/configs/pretrain/multi30k.yaml \
    --train_file data/train.parquet --validation_file data/validation.parquet --output_dir build/baseline

With --objective denoising it restores noised sentences as mBART does, here of monolingual text, one file per language:

accelerate launch --quiet recipes/pretrain.py --config recipes/configs/pretrain/multi30k.yaml \
    --objective denoising --language_pairs en-en de-de --train_file data/train.{lang} \
    --validation_file data/validation.{lang} --output_dir build/denoised
"""

from dataclasses import dataclass, field

from transformers import set_seed

from neuron_specialization.translation.arguments import DataArguments, ShapeArguments
from neuron_specialization.translation.checkpoints import load_checkpoint, new_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.denoising import MASK_TOKEN, ObjectiveArguments
from neuron_specialization.translation.results import report_training, table
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

UNUSED = ("pivot",)


@dataclass
class PretrainArguments(ShapeArguments):
    """The model: a checkpoint to continue from, or the shape of a new one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from; by default a new model."}
    )


def main() -> None:
    pretrain, objective, data, training = parse(
        PretrainArguments, ObjectiveArguments, DataArguments, SpecializationTrainingArguments, unused=UNUSED
    )
    objective.check(data.language_pairs, data.source_tag)
    set_seed(training.seed)
    train, validation, checked = data.load_checked()
    if training.process_index == 0:
        print(table(checked))
    if pretrain.model_name_or_path:
        model, tokenizer = load_checkpoint(pretrain.model_name_or_path, "float32")
    else:
        mask = MASK_TOKEN if objective.objective == "denoising" else None
        model, tokenizer = new_checkpoint(train, data.tokens, pretrain, data.max_length, mask)
    metrics = fit(
        model,
        tokenizer,
        train,
        validation,
        training,
        language_tokens=data.tokens,
        source_tag=data.source_tag,
        max_length=data.max_length,
        noise=objective.noise(tokenizer),
    )
    report_training(training.output_dir, metrics, checked, pretrain, objective, data, training)


if __name__ == "__main__":
    run(main)
