"""Shard a model over processes with FSDP2 (`fully_shard`)."""

from typing import Any

from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..neurons.base_model import unwrap


def shard(model: Any, plugin: Any) -> None:
    """Shard each layer, and the rest together, in place.

    accelerate would put the input and output embeddings into a unit of their own, but encoder-decoder models share
    them with their stacks, and a parameter cannot be in two units. It does not touch models that are sharded already.

    Args:
        model: a transformers model, with adapters or without.
        plugin: accelerate's FSDP settings.
    """
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    base = unwrap(model)
    layers = set(base._no_split_modules or ())
    for module in base.modules():
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(model, **options)
