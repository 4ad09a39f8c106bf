"""Publish an adapter on the Hub, with a model card from its files and from what other recipes measured.

python recipes/publish.py --adapter build/specialized/adapter --repo user/name --license cc-by-4.0 \\
    --scores build/scores/results.json --training build/specialized/results.json
"""

from dataclasses import dataclass, field
from pathlib import Path

from neuron_specialization.analysis.mask_plots import plot_kept
from neuron_specialization.export.hub import facts_from_results, publish
from neuron_specialization.neurons.card import CardFacts
from neuron_specialization.neurons.masks import NeuronMasks
from neuron_specialization.translation.command_line import parse, run


@dataclass
class PublishArguments:
    """What is published, and what its card says."""

    adapter: str = field(metadata={"help": "Adapter directory."})
    repo: str = field(metadata={"help": "Hub repository, such as user/name; created if missing."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    license: str | None = field(default=None, metadata={"help": "Identifier of the license, such as cc-by-4.0."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the data it was made from."})
    scores: str | None = field(default=None, metadata={"help": "results.json of recipes/score.py."})
    training: str | None = field(default=None, metadata={"help": "results.json of recipes/specialize.py."})
    sentence: str = field(default=CardFacts.sentence, metadata={"help": "Source sentence of the card's example."})


def main() -> None:
    (args,) = parse(PublishArguments)
    facts = CardFacts(args.repo, args.license, args.datasets, args.sentence, picture="kept.png")
    facts = facts_from_results(facts, args.scores, args.training)
    plot_kept(NeuronMasks.from_pretrained(args.adapter), Path(args.adapter) / "kept.png")
    print(f"published {publish(args.adapter, facts, private=args.private or None)}")


if __name__ == "__main__":
    run(main)
