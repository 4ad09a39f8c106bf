"""Time the method against its alternatives, side by side in one run: median ratios, as a table and as JSON.

python recipes/benchmark.py --output_dir build/benchmark
"""

from dataclasses import dataclass, field

import torch
from benchmark_cases.generation import generation
from benchmark_cases.identification import identification
from benchmark_cases.loss import loss_times
from benchmark_cases.storage import storage
from benchmark_cases.training import mixed_batches, training_steps

from neuron_specialization.analysis.shapes import ModelShape, random_batch
from neuron_specialization.translation.checkpoints import new_m2m100
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process, this_process
from neuron_specialization.translation.results import table, write_results


@dataclass
class BenchmarkArguments:
    """Batches, masks and rounds."""

    output_dir: str = field(metadata={"help": "Where results.json goes."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per batch."})
    length: int = field(default=64, metadata={"help": "Tokens per sentence."})
    head_d_model: int = field(default=1024, metadata={"help": "Width of one layer under a large head (NLLB 600M)."})
    head_vocab_size: int = field(default=256206, metadata={"help": "Vocabulary of that head."})
    head_tokens: int = field(default=4096, metadata={"help": "Target tokens of its batch."})
    kept: float = field(default=0.7, metadata={"help": "Share of neurons that a pair keeps."})
    repeats: int = field(default=5, metadata={"help": "Rounds that count."})


def main() -> None:
    args, shape = parse(BenchmarkArguments, ModelShape)
    check_single_process()
    torch.manual_seed(0)
    base = new_m2m100(**vars(shape)).to(this_process().device)
    batch = random_batch(base, args.batch_size, args.length)
    rows = identification(base, batch, args.repeats)
    rows += training_steps(base, batch, args.kept, args.repeats)
    rows += mixed_batches(base, batch, args.kept, args.repeats)
    head = ModelShape(1, args.head_d_model, 4 * args.head_d_model, args.head_vocab_size, heads=16)
    rows += loss_times(head, args.head_tokens, args.length, args.kept, args.repeats)
    rows += generation(base, args.length, args.kept, args.repeats)
    rows += storage(args.repeats)
    print("\n" + table(rows))
    print(f"wrote {write_results(args.output_dir, {'rows': rows, 'arguments': [vars(args), vars(shape)]})}")


if __name__ == "__main__":
    run(main)
