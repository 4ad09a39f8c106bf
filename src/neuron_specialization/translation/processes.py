"""This process among those that `accelerate launch` started."""

import atexit
from functools import cache

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """Return accelerate's state: rank, number of processes, device.

    `PartialState` alone does not see that accelerate was told to stay on the CPU, and then takes each process for the
    only one.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes > 1:
        _leave_the_group_at_exit()
    return state


@cache
def _leave_the_group_at_exit() -> None:
    """A process that ends inside its process group may abort: the group's threads are still running."""
    atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
