"""This process among those that `accelerate launch` started."""

import atexit
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

T = TypeVar("T")


def this_process() -> PartialState:
    """Return accelerate's state: rank, number of processes, device.

    `PartialState` alone ignores that accelerate was launched on the CPU, and would treat each process as the only one.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes > 1:
        _leave_the_group_at_exit()
    return state


def check_single_process() -> None:
    """Raise ValueError if there are several processes, which would all do the same work and write the same files."""
    if this_process().num_processes > 1:
        raise ValueError(
            "This recipe runs as one process: start it with `python` (where there are several GPUs, after "
            "CUDA_VISIBLE_DEVICES=0)."
        )


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` on the main process only, and return what it returns, or raise what it raises, on all."""
    sent: list = [None, None]
    if this_process().is_main_process:
        try:
            sent[0] = function()
        except (OSError, ValueError) as error:
            sent[1] = error
    broadcast_object_list(sent)
    if sent[1] is not None:
        raise sent[1]
    return sent[0]


@cache
def _leave_the_group_at_exit() -> None:
    """A process that ends inside its process group may abort: the group's threads are still running."""
    atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
