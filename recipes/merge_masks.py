"""Merge adapters that different people made for one base model: their pairs, or the union or intersection of masks.

python recipes/merge_masks.py --adapters user/masks-de other/masks-fr build/masks-fi --output_dir build/merged

Only masks are merged: what was trained under them is left out, so the result needs training.
"""

from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

from neuron_specialization.neurons.adapter_file import read_config
from neuron_specialization.neurons.files import check_not_input
from neuron_specialization.neurons.masks import NeuronMasks
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process


@dataclass
class MergeArguments:
    """What is merged."""

    adapters: list[str] = field(metadata={"help": "Adapter directories or Hub ids; their masks are taken."})
    output_dir: str = field(metadata={"help": "Adapter directory to write."})
    how: Literal["concatenate", "union", "intersection"] = field(
        default="concatenate", metadata={"help": "Collect different pairs, or combine masks of the same pairs."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace files of the same names that this package did not write."}
    )


def main() -> None:
    (args,) = parse(MergeArguments)
    check_single_process()
    if len(args.adapters) < 2:
        raise ValueError(f"Expected two adapters or more to merge, got {' '.join(args.adapters)}.")
    repeated = sorted({adapter for adapter in args.adapters if args.adapters.count(adapter) > 1})
    if repeated:
        raise ValueError(f"Each adapter may be named once, but these are repeated: {', '.join(repeated)}.")
    check_not_input(args.output_dir, *args.adapters)
    biased = [adapter for adapter in args.adapters if read_config(adapter).get("mask_bias")]
    if biased:
        raise ValueError(
            f"{', '.join(biased)} has mask_bias=True, which adapters of masks alone do not keep. Merge the masks in "
            "Python (ns.NeuronMasks) and pass mask_bias=True to the config that trains under them."
        )
    masks = reduce(getattr(NeuronMasks, args.how), map(NeuronMasks.from_pretrained, args.adapters))
    masks.save_pretrained(args.output_dir, args.overwrite_output_dir)
    print(f"wrote {args.output_dir}\n{masks}")
    trained = [adapter for adapter in args.adapters if read_config(adapter).get("trainable") != "none"]
    if trained:
        print(f"What was trained under the masks of {', '.join(trained)} is not merged: the result needs training.")


if __name__ == "__main__":
    run(main)
