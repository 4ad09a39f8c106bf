"""Publish an adapter on the Hub, with a model card from its files and from what other recipes measured.

python recipes/publish.py --adapter build/specialized/adapter --repo user/name --license cc-by-4.0 \\
    --identification build/masks/results.json --training build/specialized/run.json \\
    --scores build/scores/results.json

With --card_only model_cards/name in the place of --repo, the card is written there and nothing is uploaded. The LoRA
adapters of a comparison (build/comparison/lora/seed-0/model) are published in the same way; they need --scores.
"""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HTTPError

from neuron_specialization.export.hub import describe, facts_from_results, publish
from neuron_specialization.neurons.card_sections import CardFacts
from neuron_specialization.translation.command_line import parse, run
from neuron_specialization.translation.processes import check_single_process


@dataclass
class PublishArguments:
    """What is published, and what its card says."""

    adapter: str = field(metadata={"help": "Adapter directory."})
    repo: str | None = field(default=None, metadata={"help": "Hub repository, such as user/name; created if missing."})
    card_only: str | None = field(
        default=None, metadata={"help": "Directory to write the card and its picture into; nothing is uploaded."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    license: str | None = field(default=None, metadata={"help": "Identifier of the license, such as cc-by-4.0."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the data it was made from."})
    scores: str | None = field(
        default=None, metadata={"help": "results.json of score, or part.json of a stage of a comparison."}
    )
    training: str | None = field(default=None, metadata={"help": "run.json of the run that trained it."})
    identification: str | None = field(default=None, metadata={"help": "results.json of recipes/identify.py."})
    sentence: str | None = field(default=None, metadata={"help": "Source sentence of the card's example."})


def main() -> None:
    (args,) = parse(PublishArguments)
    check_single_process()
    if (args.repo is None) == (args.card_only is None):
        raise ValueError("Say where to publish, --repo user/name, or where to write the card, --card_only DIRECTORY.")
    facts = CardFacts(args.repo, args.license, args.datasets, sentence=args.sentence)
    facts = facts_from_results(facts, args.scores, args.training, args.identification, args.adapter)
    if args.repo is not None:
        try:
            print(f"published {publish(args.adapter, facts, private=args.private or None)}")
        except (HfHubHTTPError, ConnectionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"The Hub did not take {args.repo}: {reason} Log in with `hf auth login`, as "
                "someone who may write there, and try again."
            ) from error
        except (HTTPError, RuntimeError) as error:  # no answer, or half of one; of large files it is a RuntimeError
            if not isinstance(error, HTTPError) and not isinstance(error.__cause__, HTTPError):
                raise
            raise ValueError(f"The Hub was not reached, and nothing was published: {error} Try again.") from error
    else:
        Path(args.card_only).mkdir(parents=True, exist_ok=True)
        wrote = describe(args.adapter, facts, args.card_only)
        print(f"{'wrote' if wrote else 'edited by you, and kept as it is:'} {args.card_only}/README.md")


if __name__ == "__main__":
    run(main)
