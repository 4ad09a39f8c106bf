"""Train a few updates as one of several processes, for tests/test_distributed.py; started by accelerate launch."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from datasets import disable_progress_bars
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

import neuron_specialization as ns
from neuron_specialization.baselines.gradual import GradualMasks, gradual
from neuron_specialization.translation import loss
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.processes import check_single_process, this_process
from neuron_specialization.translation.trainer import SpecializationTrainingArguments
from neuron_specialization.translation.training import fit

written: set[str] = set()


def record_written_files(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], str) and set(args[1] or "") & set("wax"):
        written.add(args[0])
    if event == "os.rename":
        written.add(str(args[1]))


PAIRS = ["Pv-Aa", "Aa-Pv", "Pv-Ba", "Ba-Pv"]


def linear_cross_entropy_calls() -> list:
    """A list that gets an entry at each call of torch's chunked loss."""
    calls, original = [], torch.nn.functional.linear_cross_entropy

    def counted(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs)

    torch.nn.functional.linear_cross_entropy = counted
    return calls


class CutOff(TrainerCallback):
    """Stop as a crash would, after the given number of updates."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["CUT_OFF_AFTER"]):
            raise KeyboardInterrupt


def main() -> None:
    sys.addaudithook(record_written_files)
    processes, checkpoint, data, validation, masks, modes, *rest = sys.argv[1:]
    disable_progress_bars()
    if "CUT_OFF_AFTER" in os.environ:
        DEFAULT_CALLBACKS.append(CutOff)
    chunked = linear_cross_entropy_calls()
    if processes != "1":
        loss.CHUNK_LOGITS = loss.FEW_LOGITS = 0  # what one process computes from logits, several compute in chunks
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    held_out = None if validation == "none" else load_parallel(validation, PAIRS)
    for mode in modes.split(","):
        (args,) = parse(SpecializationTrainingArguments, argv=rest)
        args.output_dir = f"{args.output_dir}/{mode}"
        assert args.world_size == int(processes), f"expected {processes} processes, runs as one of {args.world_size}"
        with nullcontext() if processes == "1" else pytest.raises(ValueError, match="runs as one process"):
            check_single_process()
        if sharded:  # accelerate shards on accelerators only, though torch does the same with gloo on a CPU
            this_process().distributed_type = DistributedType.MULTI_GPU
        torch.manual_seed(0)
        model, tokenizer = load_checkpoint(checkpoint)
        model = model.double()
        train, callbacks = load_parallel(data, PAIRS), []
        if mode == "gradual":
            counts = ns.record_corpus(model, tokenizer, train)
            model = gradual(model, counts, k=0.3)
            callbacks.append(GradualMasks(model, counts, k=0.3))
        elif mode != "dense":
            config = ns.NeuronSpecializationConfig(masks=masks, trainable=mode, task_type="SEQ_2_SEQ_LM")
            model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
        fit(model, tokenizer, train, held_out, args, callbacks=callbacks)
        if sharded:
            assert any(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing was sharded"
        own_files = sorted(path for path in written if Path(path).is_relative_to(args.output_dir))
        Path(f"{args.output_dir}-written-by-{args.process_index}.json").write_text(json.dumps(own_files))
        assert bool(chunked) == (processes != "1")
        chunked.clear()


if __name__ == "__main__":
    main()
