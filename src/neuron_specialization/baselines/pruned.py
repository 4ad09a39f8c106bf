"""Models of sequential transfer with neurons pruned: after a step or before it, scored for every pair, in stages.

A stage that is done is skipped; the directory is refused once the transfer or its models are others than it began
with. A stage's directory holds `part.json`, and the model where pruning was followed by training.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.masks import NeuronMasks
from ..translation.evaluation import SCORES
from ..translation.results import write_results
from .folders import remove_checkpoints
from .sequential import SequentialTransfer
from .settings import check_settings
from .transfer_plan import PART, PRETRAINING, SEQUENTIAL, Stage, losses_of

SETTINGS = "pruning.json"
AFTER, BEFORE, RETRAINED = WHEN = ("after", "before", "retrained")
NOTHING = "none"  # pruned: the model as it is, by which the others are judged
DRAWN = ("random", "mass_matched")  # criteria that depend on a seed
UNSCOPED = "unspecialized"  # a share of each layer's activations, whatever the scope


@dataclass
class PruneArguments:
    """What is pruned."""

    transfer_dir: str = field(metadata={"help": "Output directory of transfer_sequentially.py."})
    criteria: list[str] = field(
        default_factory=lambda: ["dead", "most_activated", "least_activated", "random"],
        metadata={"help": "How neurons are chosen; see analysis/pruning_choices.py."},
    )
    rates: list[float] = field(
        default_factory=lambda: [0.01, 0.02, 0.05, 0.1, 0.2, 0.4], metadata={"help": "Shares of the neurons."}
    )
    scopes: list[str] = field(default_factory=lambda: ["layer"], metadata={"help": "Shares of each layer, or global."})
    when: list[str] = field(
        default_factory=lambda: ["after"],
        metadata={
            "help": "after: prune a step's model. before: prune the model before it and train the step without these "
            "neurons; the next step starts from the whole model again. retrained: after, and train the pair again."
        },
    )
    steps: list[int] = field(
        default_factory=list, metadata={"help": "Steps of transfer, from 1; by default the last."}
    )
    draws: int = field(default=3, metadata={"help": "Draws of a random choice."})
    retraining_updates: int = field(default=0, metadata={"help": "Updates of `retrained`."})
    export: list[str] = field(
        default_factory=list,
        metadata={
            "help": "criterion=rate: write each order's last model (seed 0, pruned after the step) as a checkpoint."
        },
    )
    tables_only: bool = field(default=False, metadata={"help": "Prune nothing: make the tables again."})


@dataclass(frozen=True)
class PrunedStage:
    """Which neurons of which model are pruned.

    Attributes:
        stage: the step of transfer.
        when: "after" the step; "retrained", after it and then trained on its pair again; or "before" it, so that the
            step itself is trained without these neurons.
        criterion: by which they are chosen; "none": nothing is pruned.
        rate: share of the neurons.
        scope: "layer" or "global".
        draw: number of the draw, of a random choice.
    """

    stage: Stage
    when: str
    criterion: str
    rate: float = 0.0
    scope: str = "layer"
    draw: int = 0

    @property
    def path(self) -> Path:
        """Directory of the stage, below the output directory."""
        choice = f"{self.scope}-{self.rate:g}-draw-{self.draw}"
        return self.stage.path / self.when / self.criterion.replace(":", "-") / choice

    @property
    def start(self) -> Stage:
        """The stage whose model is pruned, and recorded to choose by."""
        before = self.stage.start
        return before if self.when == BEFORE and before is not None else self.stage

    def about(self) -> dict[str, Any]:
        """Return what a row of results says of its stage."""
        names = ("when", "criterion", "rate", "scope", "draw")
        return {**self.stage.about(), **{name: getattr(self, name) for name in names}}


def pruned_stages(arguments: PruneArguments, transfer: SequentialTransfer) -> Iterator[PrunedStage]:
    """Yield every model to prune, and first the whole one; those of one recording follow each other."""
    steps = {
        Stage(SEQUENTIAL, seed, order[:step]): None
        for seed in range(transfer.plan.seeds)
        for order in transfer.orders
        for step in arguments.steps or [len(order)]
    }
    for stage in steps:
        for when in sorted(arguments.when):
            yield PrunedStage(stage, when, NOTHING)
            for criterion in arguments.criteria:
                draws = arguments.draws if criterion.startswith(DRAWN) else 1
                for scope in arguments.scopes[:1] if criterion.startswith(UNSCOPED) else arguments.scopes:
                    for rate in arguments.rates:
                        yield from (PrunedStage(stage, when, criterion, rate, scope, draw) for draw in range(draws))


def exported_stages(
    exports: Iterable[tuple[str, float]], scope: str, transfer: SequentialTransfer
) -> list[PrunedStage]:
    """Return the models to export: the last step of each order, seed 0, pruned by each choice at its rate."""
    last = [Stage(SEQUENTIAL, 0, order) for order in transfer.orders]
    return [PrunedStage(stage, AFTER, choice, rate, scope) for choice, rate in exports for stage in last]


def check_stages(
    arguments: PruneArguments, transfer: SequentialTransfer, exported: Iterable[PrunedStage] = ()
) -> None:
    """Raise ValueError if an argument is unknown, or a model that pruning or an export starts from is not there."""
    steps = len(transfer.language_pairs)
    unknown = sorted(set(arguments.when) - set(WHEN))
    if unknown:
        raise ValueError(f"when takes any of {', '.join(WHEN)}, got {', '.join(unknown)}.")
    if not set(arguments.steps) <= set(range(1, steps + 1)):
        raise ValueError(f"steps are numbers from 1 to {steps}, got {arguments.steps}.")
    if RETRAINED in arguments.when and arguments.retraining_updates < 1:
        raise ValueError("Set retraining_updates for models that are trained again after pruning.")
    for pruned in (*pruned_stages(arguments, transfer), *exported):
        for stage in (pruned.stage, pruned.start):
            if not transfer.is_done(stage):
                raise ValueError(f"{transfer.directory} lacks {stage.path}: run transfer_sequentially.py to its end.")


@dataclass
class Pruning:
    """Everything that pruned stages share.

    Attributes:
        transfer: the models, data and settings that they start from; the stages to prune are done.
        directory: where the pruned stages go.
        retraining_updates: of "retrained"; 0 where there is none.

    Raises:
        ValueError: if the directory holds stages of other settings, or of models that have changed since.
    """

    transfer: SequentialTransfer
    directory: Path
    retraining_updates: int = 0

    def __post_init__(self) -> None:
        later: dict[str, Any] = losses_of(self.transfer.directory, (PRETRAINING, SEQUENTIAL))
        if self.retraining_updates:
            later["retraining_updates"] = self.retraining_updates
        check_settings(self.directory, SETTINGS, {**self.transfer.settings(), **later})

    def is_done(self, pruned: PrunedStage) -> bool:
        """Whether the results of a stage stand."""
        return (self.directory / pruned.path / PART).is_file()

    def run(self, pruned: PrunedStage, masks: NeuronMasks | None, shares: Mapping[str, float]) -> None:
        """Prune, train where the stage says so, and score every pair on clean and on noisy text.

        Args:
            pruned: what to do.
            masks: rows for every pair of the transfer; None to prune nothing.
            shares: what the rows say of the pruned neurons besides their share, such as that of the mass.
        """
        directory = self.directory / pruned.path
        model = self.transfer.load(pruned.start)
        kept = 1.0 if masks is None else _share(masks)
        if masks is not None:
            model = self._masked(model, masks, "none" if pruned.when == AFTER else "full")
        spent: dict[str, Any] = {"updates": 0, "seconds": 0.0}
        if pruned.when != AFTER:
            updates = self.retraining_updates if pruned.when == RETRAINED else self.transfer.training.max_steps
            self.transfer.freeze_step(model, len(pruned.stage.trained))
            spent = self.transfer.fit(model, directory, pruned.stage.trained[-1:], updates, pruned.stage.seed)
        part = self.transfer.evaluate(
            model, self.transfer.language_pairs, {**pruned.about(), "pruned": 1 - kept, **shares}
        )
        noisy = self.transfer.scores(model, self.transfer.noisy_test())["directions"]
        for row in part["rows"]:
            row.update({f"noisy {name}": noisy[row["direction"]][name] for name in SCORES}, **spent)
        remove_checkpoints(directory)
        write_results(directory, part, PART)  # last: it says that the stage is done

    def export(self, pruned: PrunedStage, masks: NeuronMasks) -> Any:
        """Return the model of a stage that is not trained after pruning, with its masks, to be made compact."""
        return self._masked(self.transfer.load(pruned.start), masks, "none")

    def _masked(self, model: Any, masks: NeuronMasks, trainable: str) -> Any:
        options: dict[str, Any] = {"source_tag": self.transfer.source_tag, "task_type": "SEQ_2_SEQ_LM"}
        config = NeuronSpecializationConfig(masks=masks, trainable=trainable, mask_bias=True, **options)
        return get_peft_model(model, config)


def _share(masks: NeuronMasks) -> float:
    """Return the share of all neurons that masks of a single row keep."""
    kept = sum(int(rows.sum()) for rows in masks.rows.values())
    return kept / sum(rows.numel() for rows in masks.rows.values())


def collect_pruned(directory: str | Path) -> list[dict[str, Any]]:
    """Read the rows of whatever pruned stages are there: one per stage and direction."""
    parts = (
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(directory).glob(f"seed-*/**/{PART}"))
    )
    return [row for part in parts for row in part["rows"]]
