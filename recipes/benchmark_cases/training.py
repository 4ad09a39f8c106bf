"""Training steps and mixed batches, compared with dense models and LoRA."""

import copy

import torch

from neuron_specialization.analysis.timing import TrainingStep, compare, work

from .models import LORA, PAIRS, adapted, lora


def training_steps(base, batch: dict, kept: float, repeats: int) -> list[dict]:
    """Compare updates of `full` with dense ones for several shares of kept neurons, and of `delta` with LoRA."""
    dense = TrainingStep(copy.deepcopy(base), batch)
    rows = []
    for share in (0.6, kept, 0.9, 1.0):
        full = TrainingStep(adapted(base, "full", share), batch)
        functions, target = {"full": full, "dense": dense}, "<= 0.90" if share < 0.9 else "<= 1.02"
        row = compare(f"training step, full, {share:.0%} kept", functions, {"dense": target}, repeats)[0]
        rows.append({**row, "FLOPs": work(full)[0] / work(dense)[0]})
    functions = {"delta": TrainingStep(adapted(base, "delta", kept), batch)}
    functions["LoRA r=16"] = TrainingStep(lora(base), batch)
    return rows + compare("training step, delta", functions, {"LoRA r=16": "<= 1.00"}, repeats)


def mixed_batches(base, batch: dict, kept: float, repeats: int) -> list[dict]:
    """Compare forward passes over batches whose samples belong to eight pairs."""
    order = [i % len(PAIRS) for i in range(len(batch["input_ids"]))]
    ours, many = adapted(base, "none", kept).eval(), lora(base)
    for i in range(len(PAIRS)):
        many.add_adapter(f"lora{i}", LORA)
    functions = {
        "ours": lambda: ours(**batch, language_pairs=[PAIRS[i] for i in order]),
        "dense": lambda: base.eval()(**batch),
        "LoRA, 8 adapter_names": lambda: many.eval()(**batch, adapter_names=[f"lora{i}" for i in order]),
    }
    functions = {name: torch.no_grad()(function) for name, function in functions.items()}
    return compare("mixed batch of 8 pairs, forward", functions, {"dense": "<= 1.05"}, repeats)
