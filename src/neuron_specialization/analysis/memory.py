"""Memory of training: what follows from shapes, and what is measured."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .timing import TrainingStep


def training_memory(model: nn.Module) -> dict[str, int]:
    """Return the bytes that training `model` with Adam holds, activations aside; computed, so it may be on "meta".

    Returns:
        "weights" (parameters and buffers), "gradients" and "optimizer" (two moments) of what is trained, and "file":
        the tensors of the adapter, or of the model where it has none.
    """
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    file = get_peft_model_state_dict(model).values() if hasattr(model, "peft_config") else model.parameters()
    return {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": trained,
        "optimizer": 2 * trained,
        "file": _bytes(file),
    }


def measured_memory(step: TrainingStep) -> dict[str, int]:
    """Train one step, save, and return what `training_memory` computes as measured, and the "peak" of a step.

    The peak counts every allocation of a further step, on top of weights and optimizer states.
    """
    step()
    model: Any = step.model
    model(**step.batch).loss.backward()
    gradients = _bytes(p.grad for p in model.parameters() if p.grad is not None)
    step.optimizer.zero_grad()
    weights, optimizer = _held(step)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        file = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    peak = step_peak(step)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "file": file, "peak": peak}


def step_peak(step: TrainingStep) -> int:
    """Return the bytes that a further step holds at most: weights, optimizer states, and what the step allocates."""
    return sum(_held(step)) + _peak_allocation(step)


def _held(step: TrainingStep) -> tuple[int, int]:
    """Return the bytes of weights and buffers, and of optimizer states."""
    states = (value for state in step.optimizer.state.values() for value in state.values())
    return _bytes([*step.model.parameters(), *step.model.buffers()]), _bytes(states)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors, tied ones once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _peak_allocation(step: TrainingStep) -> int:
    """Return the most bytes that a step has allocated at one time, on the device of its model."""
    device = step.model.device
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        step()
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    allocated = peak = 0
    for _, size in allocations:
        allocated += size
        peak = max(peak, allocated)
    return peak
