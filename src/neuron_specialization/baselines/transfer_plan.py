"""Sequential transfer (arXiv 2412.13881): which models are trained, in which order, and what is known of them.

For each seed, with U updates per step and T pairs:

- pretraining              source → source: copying, or restoring dropped words
- sequential/en-de/en-fr   one pair after another, U updates each; orders that begin alike share their first steps
- masks/en-de/en-fr        likewise, each pair under its own neurons (the masks are those of the pre-trained model)
- joint                    all pairs together from the pre-trained model, T x U updates
- bilingual/en-de          one pair alone, from scratch, U updates
"""

import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..translation.arguments import ShapeArguments
from ..translation.evaluation import SCORES

PART, ROBUSTNESS = "part.json", "robustness.json"
PRETRAINING, SEQUENTIAL, MASKS, JOINT, BILINGUAL = METHODS = "pretraining", "sequential", "masks", "joint", "bilingual"


@dataclass
class SequentialArguments:
    """The orders of transfer, and what they are compared with; `max_steps` of the Trainer is the updates of a step."""

    orders: list[str] = field(
        default_factory=list, metadata={"help": "Orders of the pairs, such as en-de/en-fr/en-es; all: every order."}
    )
    freeze: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "What is frozen in each step, or in all: encoder, decoder, embeddings, none, or module names; "
            "several joined by +."
        },
    )
    pretraining_updates: int = field(default=1000, metadata={"help": "Updates of source → source; 0 for none."})
    word_dropout: float = field(default=0.0, metadata={"help": "Share of source words left out in pre-training."})
    compare: list[str] = field(
        default_factory=lambda: [JOINT, BILINGUAL, MASKS],
        metadata={"help": "Any of joint, bilingual and masks; none: sequential transfer alone."},
    )
    k: float = field(default=0.95, metadata={"help": "Share of activations that the kept neurons make up (masks)."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds, from 0."})
    evaluations: int = field(default=5, metadata={"help": "Validations of a stage, of which the best is kept."})
    num_beams: int = field(default=5, metadata={"help": "Beams on the test set."})


@dataclass
class StartArguments(ShapeArguments):
    """What transfer starts from: a checkpoint, or the shape of a new model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from; by default a new model for each seed."}
    )


@dataclass(frozen=True)
class Stage:
    """One model to train and evaluate.

    Attributes:
        method: one of METHODS.
        seed: of initialization, dropout and the order of batches.
        trained: pairs trained so far, in order; the last one is trained now ("joint": all of them).
    """

    method: str
    seed: int
    trained: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Directory of the stage, below the output directory."""
        inner = () if self.method == JOINT else self.trained
        return Path(f"seed-{self.seed}", self.method, *inner)

    @property
    def start(self) -> "Stage | None":
        """The stage whose model this one continues; None to start from scratch."""
        if self.method in (PRETRAINING, BILINGUAL):
            return None
        if self.method == JOINT or len(self.trained) == 1:
            return Stage(PRETRAINING, self.seed)
        return Stage(self.method, self.seed, self.trained[:-1])

    def about(self) -> dict[str, Any]:
        """Return what a row of results says of its stage."""
        order = "" if self.method == JOINT else "/".join(self.trained)
        return {"method": self.method, "seed": self.seed, "order": order, "step": len(self.trained) if order else 0}


def stages_of(plan: SequentialArguments, orders: Sequence[tuple[str, ...]], pairs: Sequence[str]) -> list[Stage]:
    """Return every stage, each one after those that it starts from; orders share their common beginnings."""
    found: dict[Stage, None] = {}
    for seed in range(plan.seeds):
        found[Stage(PRETRAINING, seed)] = None
        prefixes = [order[:step] for order in orders for step in range(1, len(order) + 1)]
        found |= {Stage(SEQUENTIAL, seed, prefix): None for prefix in prefixes}
        if JOINT in plan.compare:
            found[Stage(JOINT, seed, tuple(pairs))] = None
        if BILINGUAL in plan.compare:
            found |= {Stage(BILINGUAL, seed, (pair,)): None for pair in pairs}
        if MASKS in plan.compare:
            found |= {Stage(MASKS, seed, prefix): None for prefix in prefixes}
    return list(found)


def orders_of(orders: Sequence[str], pairs: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the orders named, or, of "all", every one there is.

    Raises:
        ValueError: if there is none, or one of them is not made of all pairs.
    """
    if list(orders) == ["all"]:
        return list(itertools.permutations(pairs))
    found = [tuple(order.split("/")) for order in orders]
    wrong = [order for order, of in zip(orders, found, strict=True) if sorted(of) != sorted(pairs)]
    if wrong or not found:
        raise ValueError(
            f"orders holds the language pairs in the order of their training, such as {'/'.join(pairs)}, or is `all`; "
            f"got {', '.join(wrong) or 'none'}."
        )
    return found


def collect(directory: str | Path) -> dict[str, Any]:
    """Read whatever stages are there.

    Returns:
        "rows": one per stage and direction; "stages": one per stage, with what it took; "robustness": one per final
        model, direction and kind of noise, with the clean scores beside as "clean bleu" and "clean chrf++";
        "signatures": direction → signatures of its scores.
    """
    found: dict[str, Any] = {"rows": [], "stages": [], "robustness": [], "signatures": {}}
    for path in sorted(Path(directory).glob(f"seed-*/**/{PART}")):
        part = json.loads(path.read_text(encoding="utf-8"))
        found["rows"] += part["rows"]
        found["stages"].append(part["stage"])
        found["signatures"] |= part["signatures"]
        noisy = path.with_name(ROBUSTNESS)
        if noisy.is_file():
            clean = {row["direction"]: row for row in part["rows"]}
            for row in json.loads(noisy.read_text(encoding="utf-8"))["rows"]:
                scores = {f"clean {name}": clean[row["direction"]][name] for name in SCORES}
                found["robustness"].append({**row, **scores})
    return found


def losses_of(directory: str | Path, methods: Collection[str] = METHODS) -> dict[str, dict[str, float]]:
    """Return what tells a directory's models from others of the same stages: name of the model → pair → test loss.

    Losses are in full precision.

    Args:
        directory: of the stages.
        methods: whose models.
    """
    found: dict[str, dict[str, float]] = {}
    for row in collect(directory)["rows"]:
        if row["method"] in methods:
            name = "/".join(filter(None, (row["method"], row["order"])))
            found.setdefault(f"losses of seed {row['seed']}, {name}", {})[row["direction"]] = row["loss"]
    return found
