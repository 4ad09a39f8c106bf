"""Memory of training by `trainable`: computed for the shapes of NLLB, computed and measured for one that runs here.

python recipes/memory.py --output_dir build/memory
"""

import copy
from dataclasses import dataclass, field

import torch
from benchmark_cases.loss import loss_peaks
from peft import LoraConfig, get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis.memory import measured_memory, training_memory
from neuron_specialization.analysis.shapes import NLLB_SHAPES, ModelShape, random_batch, random_masks
from neuron_specialization.analysis.timing import TrainingStep
from neuron_specialization.neurons.language_pairs import Routes
from neuron_specialization.translation.checkpoints import new_m2m100
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process, this_process
from neuron_specialization.translation.results import check_results, table, write_results

COMPARED = {"full": "dense", "delta": "LoRA r=16"}


@dataclass
class MemoryArguments:
    """Batch, masks and language pairs."""

    output_dir: str = field(metadata={"help": "Where memory.json goes."})
    batch_size: int = field(default=64, metadata={"help": "Sentences per update."})
    length: int = field(default=64, metadata={"help": "Tokens per sentence."})
    pairs: int = field(default=60, metadata={"help": "Language pairs with masks."})
    head_d_model: int = field(default=1024, metadata={"help": "Width of one layer under a large head (NLLB 600M)."})
    head_vocab_size: int = field(default=256206, metadata={"help": "Vocabulary of that head."})
    head_tokens: int = field(default=4096, metadata={"help": "Target tokens of its batch."})
    kept: float = field(default=0.7, metadata={"help": "Share of neurons that a pair keeps."})


def main() -> None:
    args, shape = parse(MemoryArguments, ModelShape)
    check_single_process()
    check_results(args.output_dir, "memory.json")
    torch.manual_seed(0)
    base = new_m2m100(**vars(shape)).to(this_process().device)
    batch = random_batch(base, args.batch_size, args.length)
    rows, peaks = [], {}
    for name, model in ways_to_train(base, args):
        print(name, flush=True)
        rows.append({"model": "here, computed", "trained": name, **training_memory(model)})
        if name != "none":
            measured = measured_memory(TrainingStep(model, batch))
            peaks[name] = measured["peak"]
            rows.append({"model": "here, measured", "trained": name, **measured})
    for name, nllb in NLLB_SHAPES.items():
        with torch.device("meta"):
            base = new_m2m100(**vars(nllb))
        rows += [{"model": name, "trained": way, **training_memory(model)} for way, model in ways_to_train(base, args)]
    megabytes = [
        {column: value / 1e6 if isinstance(value, int) else value for column, value in row.items()} for row in rows
    ]
    print("\nMB in float32, trained with AdamW:\n\n" + table(megabytes))
    ratios = [
        {"peak of a step": ours, "compared with": other, "ratio": peaks[ours] / peaks[other], "target": "<= 1.05"}
        for ours, other in COMPARED.items()
    ]
    results = {"bytes": rows, "peaks": ratios, "arguments": [vars(args), vars(shape)]}
    write_results(args.output_dir, results, "memory.json")  # what follows needs the most memory: 20 GB by default
    head = ModelShape(1, args.head_d_model, 4 * args.head_d_model, args.head_vocab_size, heads=16)
    ratios += loss_peaks(head, args.head_tokens, args.length, args.kept)
    print("\n" + table(ratios))
    print(f"wrote {write_results(args.output_dir, results, 'memory.json')}")


def ways_to_train(base, args: MemoryArguments):
    """Yield the name and the model of each way to train copies of the base."""
    masks = random_masks(base, Routes.per_pair([f"l{i}-en" for i in range(args.pairs)]), args.kept)
    yield "dense", copy.deepcopy(base)
    lora = LoraConfig(r=16, target_modules=["fc1"], task_type="SEQ_2_SEQ_LM")
    yield "LoRA r=16", get_peft_model(copy.deepcopy(base), lora, low_cpu_mem_usage=base.device.type == "meta")
    for trainable in ("none", "low_rank", "delta", "full"):
        config = ns.NeuronSpecializationConfig(masks=masks, trainable=trainable, task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(copy.deepcopy(base), config)
        model.set_language_pair("l0-en")
        yield trainable, model


if __name__ == "__main__":
    run(main)
