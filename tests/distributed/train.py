"""Train a few updates as one of several processes, for tests/test_distributed.py; started by accelerate launch."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from datasets import disable_progress_bars
from peft import get_peft_model
from torch.distributed.tensor import DTensor

import neuron_specialization as ns
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.command_line import parse
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.processes import this_process
from neuron_specialization.translation.training import SpecializationTrainingArguments, fit

written: set[str] = set()


def note_what_is_written(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], str) and set(args[1] or "") & set("wax"):
        written.add(args[0])
    if event == "os.rename":
        written.add(str(args[1]))


PAIRS = ["Pv-Aa", "Aa-Pv", "Pv-Ba", "Ba-Pv"]


def main() -> None:
    sys.addaudithook(note_what_is_written)
    processes, checkpoint, data, validation, masks, mode, *rest = sys.argv[1:]
    (args,) = parse(SpecializationTrainingArguments, argv=rest)
    disable_progress_bars()
    torch.manual_seed(0)
    model, tokenizer = load_checkpoint(checkpoint)
    if mode != "dense":
        config = ns.NeuronSpecializationConfig(masks=masks, trainable=mode, task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, config)
    assert args.world_size == int(processes), f"expected {processes} processes, runs as one of {args.world_size}"
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if sharded:  # accelerate shards on accelerators only, though torch does the same with gloo on a CPU
        this_process().distributed_type = DistributedType.MULTI_GPU
    held_out = None if validation == "none" else load_parallel(validation, PAIRS)
    fit(model, tokenizer, load_parallel(data, PAIRS), held_out, args)
    if sharded:
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing was sharded"
    mine = sorted(path for path in written if Path(path).is_relative_to(args.output_dir))
    Path(f"{args.output_dir}-written-by-{args.process_index}.json").write_text(json.dumps(mine))


if __name__ == "__main__":
    main()
