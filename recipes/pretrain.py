r"""Train a multilingual baseline, from scratch or from a checkpoint, until the validation loss stops improving.

accelerate launch --quiet recipes/pretrain.py --config recipes/configs/pretrain/multi30k.yaml \
    --train_file data/train.parquet --validation_file data/validation.parquet --output_dir build/baseline
"""

from dataclasses import dataclass, field

from transformers import set_seed

from neuron_specialization.translation.arguments import DataArguments
from neuron_specialization.translation.checkpoints import load_checkpoint, new_model
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.results import report_training, table
from neuron_specialization.translation.tokenization import train_tokenizer
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

UNUSED = ("pivot",)


@dataclass
class PretrainArguments:
    """The model: a checkpoint to continue from, or the shape of a new one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from; by default a new model."}
    )
    vocab_size: int = field(default=8000, metadata={"help": "Entries of a new model's shared BPE."})
    layers: int = field(default=6, metadata={"help": "Layers of a new model's encoder, and of its decoder."})
    d_model: int = field(default=512, metadata={"help": "Width of a new model."})
    d_ff: int = field(default=2048, metadata={"help": "FFN neurons per layer of a new model."})
    heads: int = field(default=8, metadata={"help": "Attention heads of a new model."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of a new model."})


def main() -> None:
    pretrain, data, training = parse(PretrainArguments, DataArguments, SpecializationTrainingArguments, unused=UNUSED)
    set_seed(training.seed)
    train, validation, checked = data.load_checked()
    if training.process_index == 0:
        print(table(checked))
    if pretrain.model_name_or_path:
        model, tokenizer = load_checkpoint(pretrain.model_name_or_path)
    else:
        languages = dict.fromkeys(code for pair in data.language_pairs for code in pair.split("-"))
        tags = [data.tokens.get(code, code) for code in languages]
        text = (sentence for rows in train.values() for side in ("source", "target") for sentence in rows[side])
        tokenizer = train_tokenizer(text, tags, pretrain.vocab_size, data.max_length)
        shape = (pretrain.layers, pretrain.d_model, pretrain.d_ff, pretrain.heads, pretrain.dropout)
        model = new_model(tokenizer, *shape, data.max_length)
    metrics = fit(
        model,
        tokenizer,
        train,
        validation,
        training,
        language_tokens=data.tokens,
        source_tag=data.source_tag,
        max_length=data.max_length,
    )
    report_training(training.output_dir, metrics, checked, pretrain, data, training)


if __name__ == "__main__":
    run(main)
