r"""Sparse continued training under the masks of each pair; `--masks none` is the fine-tuning baseline.

accelerate launch --quiet recipes/specialize.py --config recipes/configs/specialize/multi30k.yaml \
    --model_name_or_path path/to/checkpoint --masks build/masks --train_file data/train.parquet \
    --validation_file data/validation.parquet --output_dir build/specialized
"""

from dataclasses import dataclass, field

from peft import get_peft_model
from transformers import set_seed

import neuron_specialization as ns
from neuron_specialization.neurons.files import check_not_input
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.results import report_training, table
from neuron_specialization.translation.tokenization import resolve_tokens
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

UNUSED = ("adapter", "pivot")


@dataclass
class SpecializeArguments:
    """The masks, and what trains under them."""

    masks: str = field(metadata={"help": "Adapter directory or Hub id with masks, or 'none' to fine-tune densely."})
    trainable: str = field(default="full", metadata={"help": "full (the paper), delta, or low_rank."})
    r: int = field(default=8, metadata={"help": "Rank of low_rank."})


def main() -> None:
    args, where, data, training = parse(
        SpecializeArguments, ModelArguments, DataArguments, SpecializationTrainingArguments, unused=UNUSED
    )
    check_not_input(f"{training.output_dir}/adapter", args.masks)
    if training.overwrite_output_dir:
        check_not_input(training.output_dir, args.masks, contents=True)
    set_seed(training.seed)
    train, validation, checked = data.load_checked()
    if training.process_index == 0:
        print(table(checked))
    model, tokenizer = load_checkpoint(where.model_name_or_path)
    tokens = resolve_tokens(tokenizer, data.language_pairs, data.tokens)
    dense = args.masks == "none"
    if not dense or args.trainable != "full":
        config = ns.NeuronSpecializationConfig(
            masks=None if dense else args.masks,
            language_pairs=data.language_pairs if dense else None,
            trainable=args.trainable,
            r=args.r,
            language_token_ids=ns.language_token_ids(tokenizer, tokens),
            source_tag=data.source_tag,
            task_type="SEQ_2_SEQ_LM",
        )
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
    metrics = fit(
        model,
        tokenizer,
        train,
        validation,
        training,
        language_tokens=tokens,
        source_tag=data.source_tag,
        max_length=data.max_length,
    )
    report_training(training.output_dir, metrics, checked, args, where, data, training)


if __name__ == "__main__":
    run(main)
