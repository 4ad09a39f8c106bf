r"""Sparse continued training under the masks of each pair; `--masks none` is the fine-tuning baseline.

accelerate launch --quiet recipes/specialize.py --config recipes/configs/specialize/multi30k.yaml \
    --model_name_or_path path/to/checkpoint --masks build/masks --train_file data/train.parquet \
    --validation_file data/validation.parquet --output_dir build/specialized

With --trainable delta, `--adapter DIRECTORY` continues an adapter that was trained with it too and adds the pairs of
--masks, and `--protect PAIRS` freezes the rows that these pairs use, so that what they translate does not change.
"""

from dataclasses import dataclass, field

from peft import PeftModel, get_peft_model
from transformers import set_seed

import neuron_specialization as ns
from neuron_specialization.adapter.adding_pairs import trainable_shares
from neuron_specialization.export.hub import facts_from_results, identification_beside
from neuron_specialization.neurons.card_sections import CardFacts
from neuron_specialization.neurons.files import check_not_input
from neuron_specialization.translation.arguments import DataArguments, ModelArguments
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.results import report_training, table
from neuron_specialization.translation.tokenization import resolve_tokens
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

UNUSED = ("pivot",)


@dataclass
class SpecializeArguments:
    """The masks, and what trains under them."""

    masks: str = field(metadata={"help": "Adapter directory or Hub id with masks, or 'none' to fine-tune densely."})
    trainable: str = field(default="full", metadata={"help": "full (the paper), delta, or low_rank."})
    r: int = field(default=8, metadata={"help": "Rank of low_rank."})
    protect: list[str] = field(
        default_factory=list, metadata={"help": "Pairs whose outputs must not change; needs --trainable delta."}
    )
    update_only: bool = field(default=False, metadata={"help": "Mask what delta or low_rank adds, not the base."})


def main() -> None:
    args, where, data, training = parse(
        SpecializeArguments, ModelArguments, DataArguments, SpecializationTrainingArguments, unused=UNUSED
    )
    check_not_input(f"{training.output_dir}/adapter", args.masks, where.adapter)
    if training.overwrite_output_dir:
        check_not_input(training.output_dir, args.masks, where.adapter, contents=True)
    if args.trainable == "none":
        raise ValueError("--trainable none trains nothing; expected full, delta or low_rank.")
    dense, shares = args.masks == "none", {}
    if (where.adapter or args.protect) and (dense or args.trainable != "delta"):
        raise ValueError("--adapter and --protect need --masks and --trainable delta, whose rows belong to pairs.")
    if where.adapter and args.update_only:
        raise ValueError("--adapter brings its own update_only; leave --update_only out.")
    set_seed(training.seed)
    train, validation, checked = data.load_checked()
    if training.process_index == 0:
        print(table(checked))
    model, tokenizer = load_checkpoint(where.model_name_or_path, "float32")
    tokens = resolve_tokens(tokenizer, data.language_pairs, data.tokens, data.source_tag)
    token_ids = ns.language_token_ids(tokenizer, tokens)
    if where.adapter is not None:
        masks = ns.NeuronMasks.from_pretrained(args.masks)
        model = ns.add_pairs(model, where.adapter, masks, args.protect, token_ids)
    elif not dense or args.trainable != "full" or args.update_only:
        config = ns.NeuronSpecializationConfig(
            masks=None if dense else args.masks,
            language_pairs=data.language_pairs if dense else None,
            trainable=args.trainable,
            r=args.r,
            update_only=args.update_only,
            protected_pairs=args.protect or None,
            language_token_ids=token_ids,
            source_tag=data.source_tag,
            task_type="SEQ_2_SEQ_LM",
        )
        model = get_peft_model(model, config)
    if isinstance(model, PeftModel):
        model.print_trainable_parameters()
    if args.protect:
        shares = trainable_shares(model.peft_config["default"].masks, args.protect, data.language_pairs)
        if training.process_index == 0:
            print(table([{"pair": pair, "share of its rows left to train": share} for pair, share in shares.items()]))
    # with --adapter, the masks and what was counted for them are those of the added pairs alone
    identified = None if where.adapter else identification_beside(args.masks)
    metrics = fit(
        model,
        tokenizer,
        train,
        validation,
        training,
        language_tokens=tokens,
        source_tag=data.source_tag,
        max_length=data.max_length,
        card=facts_from_results(CardFacts(), identification=identified) if identified else None,
    )
    if shares:
        metrics["share_of_rows_trained"] = shares
    report_training(training.output_dir, metrics, checked, args, where, data, training)


if __name__ == "__main__":
    run(main)
