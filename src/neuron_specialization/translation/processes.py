"""This process among those that `accelerate launch` started."""

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """Return accelerate's state: rank, number of processes, device.

    `PartialState` alone does not see that accelerate was told to stay on the CPU, and then takes each process for the
    only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
