"""Comparable timings: functions take turns in one run, and ratios are taken within each round."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode


def side_by_side(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Time functions in turns, A B C C B A A B C ..., so that the machine's drift affects all of them equally.

    Args:
        functions: name → function.
        repeats: counted rounds.
        warmup: rounds before them.

    Returns:
        name → its times in seconds, one per round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        order = list(functions)
        for name in order if round_ % 2 == 0 else reversed(order):
            _synchronize()
            started = time.perf_counter()
            functions[name]()
            _synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def compare(
    what: str, functions: Mapping[str, Callable[[], Any]], targets: Mapping[str, str], repeats: int
) -> list[dict[str, Any]]:
    """Return one row per pair of functions: the first one's time as a ratio of each other's, the median over rounds.

    Ratios are taken within a round, where both ran under nearly the same load; "rounds" gives their range.

    Args:
        what: what is timed.
        functions: name → function, timed by `side_by_side`; the first is compared with the others.
        targets: name of another function → the intended ratio, as text for the table.
        repeats: counted rounds.
    """
    times = side_by_side(functions, repeats)
    first, *others = functions
    rows = []
    for other in others:
        ratios = [ours / theirs for ours, theirs in zip(times[first], times[other], strict=True)]
        row = {"what": what, "compared with": other, "ratio": statistics.median(ratios)}
        row |= {"rounds": f"{min(ratios):.2f} to {max(ratios):.2f}", "target": targets.get(other, "")}
        rows.append({**row, "ms": 1e3 * statistics.median(times[first])})
        print(f"{what}: {first} takes {row['ratio']:.2f} ({row['rounds']}) of {other}", flush=True)
    return rows


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class TrainingStep:
    """One update of a model with AdamW on one batch, to be called again and again."""

    def __init__(self, model: Any, batch: Mapping[str, Any]) -> None:
        self.model, self.batch = model.train(), batch
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def __call__(self) -> None:
        self.model.train()(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def work(function: Callable[[], Any]) -> tuple[int, int]:
    """Return the floating-point operations of a call, and the bytes of linear layers' weights that it reads."""
    read = 0

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal read
        if isinstance(module, nn.Linear):
            read += module.weight.nbytes

    handle = register_module_forward_pre_hook(count)
    with FlopCounterMode(display=False) as counter:
        function()
    handle.remove()
    return counter.get_total_flops(), read
