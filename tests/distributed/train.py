"""Train a few updates as one of several processes, for tests/test_distributed.py; started by accelerate launch."""

import sys

import torch
from datasets import disable_progress_bars
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.translation.arguments import parse
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.training import SpecializationTrainingArguments, fit

PAIRS = ["Pv-Aa", "Aa-Pv", "Pv-Ba", "Ba-Pv"]


def main() -> None:
    processes, checkpoint, data, masks, mode, *rest = sys.argv[1:]
    (args,) = parse(SpecializationTrainingArguments, argv=rest)
    disable_progress_bars()
    torch.manual_seed(0)
    model, tokenizer = load_checkpoint(checkpoint)
    if mode != "dense":
        config = ns.NeuronSpecializationConfig(masks=masks, trainable=mode, task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, config)
    assert args.world_size == int(processes), f"expected {processes} processes, runs as one of {args.world_size}"
    fit(model, tokenizer, load_parallel(data, PAIRS), None, args)


if __name__ == "__main__":
    main()
