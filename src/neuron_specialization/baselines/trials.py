"""Choose what a stage is trained with: trials of learning rates and of a method's own knobs, on validation data."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..translation.results import write_results
from ..translation.runs import RUN_FILE
from .folders import alone, remove_checkpoints
from .methods import (
    EQUAL_SECONDS,
    IDENTIFIED_BY,
    LASS,
    OURS,
    UNTRAINED,
    WEIGHTS,
    MethodArguments,
    knob_grids,
    parse_method,
    settings_of,
)
from .settings import StageArguments

if TYPE_CHECKING:
    from .models import Models


TRIAL = "trial.json"


@dataclass(frozen=True)
class Setting:
    """What a stage is trained with: its learning rate, None where nothing is trained, and the knobs of its method."""

    learning_rate: float | None
    knobs: MethodArguments


def depends_on(method: str, args: MethodArguments, stage: StageArguments) -> dict[str, Any]:
    """Return what the stages of a method depend on beyond what all stages do: "learning_rates of ours" → value.

    That includes what other methods depend on whose trials choose something for it.
    """
    kind, knobs = parse_method(method, args)
    grids = knob_grids(stage.knobs)
    own = {**settings_of(kind, knobs), "grid": grids.get(method, {})}
    if kind not in UNTRAINED:
        own[_rates_of(kind)] = getattr(stage, _rates_of(kind))
    found = {f"{name} of {method}": value for name, value in own.items()}
    others = ["fine_tune"] if kind in EQUAL_SECONDS else []
    if IDENTIFIED_BY.get(kind) == WEIGHTS:
        others.append("fine_tune_single")
    shared = _shares_knobs_of(kind)
    if shared is not None:
        found[f"grid of {shared}"] = grids.get(shared, {})
        others += [shared] if shared in grids else []
    for other in others:
        found |= depends_on(other, args, stage)
    return found


def _rates_of(kind: str) -> str:
    """Return which learning rates are tried for a method."""
    return "scratch_learning_rates" if kind == "bilingual" else "learning_rates"


def _shares_knobs_of(kind: str) -> str | None:
    """Return the method whose masks those of this one are made from, with the knobs that its trials choose."""
    if kind in OURS and kind != "ours":
        return "ours"
    return "lass" if kind in LASS and kind != "lass" else None


@dataclass
class Trials:
    """The trials of a comparison, each in a directory beside the stages of its method."""

    models: "Models"

    def setting(self, method: str) -> Setting:
        """Return what a stage is trained with: what gave the lowest validation loss in trials.

        Learning rates are tried first, then the values of each knob that the comparison lists for the method, one knob
        after the other, all with seed 0. Methods with masks made from those of "ours" or "lass" share its knobs. A
        knob's value in the stage's name is not tuned. Where there is one value, none is tried. Trials never see test
        data, and their results are kept beside the stages. The methods of EQUAL_SECONDS are trained as "fine_tune" is.
        """
        kind = self.models.kind(method)
        if kind in EQUAL_SECONDS:
            return self.setting("fine_tune")
        grids = knob_grids(self.models.stage.knobs)
        shared = _shares_knobs_of(kind)
        tuned = self.setting(shared).knobs if shared is not None and shared in grids else self.models.method
        knobs = parse_method(method, tuned)[1]
        if kind in UNTRAINED:
            return Setting(None, knobs)
        rates = getattr(self.models.stage, _rates_of(kind))
        best = self._best(method, [Setting(rate, knobs) for rate in rates])
        for name, values in grids.get(method, {}).items():
            tried = [Setting(best.learning_rate, replace(best.knobs, **{name: value})) for value in values]
            best = self._best(method, tried)
        return best

    def _best(self, method: str, settings: list[Setting]) -> Setting:
        """Return the setting whose trial has the lowest validation loss; a single one needs no trial."""
        return settings[0] if len(settings) == 1 else min(settings, key=lambda setting: self._trial(method, setting))

    def _trial(self, method: str, setting: Setting) -> float:
        """Return the mean validation loss over directions after `trial_share` of the updates."""
        directory = self._trial_directory(method, setting)
        with alone(self.models.directory, f"{method}-{directory.name}"):
            if not (directory / TRIAL).is_file():
                self._try(method, setting, directory)
        losses = json.loads((directory / TRIAL).read_text(encoding="utf-8"))["validation_loss"].values()
        if not all(loss is not None and math.isfinite(loss) for loss in losses):  # it diverged
            return math.inf
        return sum(losses) / len(losses)

    def _try(self, method: str, setting: Setting, directory: Path) -> None:
        stage, groups, of_stage = self.models.stage, self.models.groups(method), self.models.updates(method)
        updates = max(1, int(of_stage * stage.trial_share))
        if self.models.per_direction(method):
            groups = groups[:: max(1, len(groups) // stage.tuning_directions)][: stage.tuning_directions]
        losses: dict[str, float] = {}
        for pairs in groups:
            where = self.models.part_directory(directory, method, pairs)
            model, _ = self.models.trained(method, 0, setting, pairs, updates, where)
            losses |= self.models.losses(model, "validation", pairs)
            if updates == of_stage:
                remove_checkpoints(where)  # the rest may become a stage
            else:
                shutil.rmtree(where)
        knobs = {"learning_rate": setting.learning_rate, "knobs": self._other_knobs(method, setting.knobs)}
        write_results(directory, {**knobs, "updates": updates, "validation_loss": losses}, TRIAL)

    def _trial_directory(self, method: str, setting: Setting) -> Path:
        knobs = [f"{name}={value:g}" for name, value in self._other_knobs(method, setting.knobs).items()]
        return self.models.directory / method / "-".join(["trial", f"{setting.learning_rate:g}", *knobs])

    def adopt(self, method: str, setting: Setting, pairs: list[str], directory: Path) -> None:
        """Make the chosen trial of all updates, if there is one, the run of the stage with its seed, which it is.

        What other trials trained is removed.
        """
        if setting.learning_rate is None or (directory / RUN_FILE).is_file():
            return
        chosen = self._trial_directory(method, setting)
        for trial in (self.models.directory / method).glob("trial-*"):
            where = self.models.part_directory(trial, method, pairs)
            # the run's description last: without it there is no run, with it there is the whole one
            for path in [where / name for name in ("model", "adapter", RUN_FILE) if (where / name).exists()]:
                if trial == chosen:
                    directory.mkdir(parents=True, exist_ok=True)
                    shutil.move(path, directory)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _other_knobs(self, method: str, knobs: MethodArguments) -> dict[str, Any]:
        """Return the knobs that differ from those that the comparison or the stage's name gives."""
        given = vars(parse_method(method, self.models.method)[1])
        return {name: value for name, value in vars(knobs).items() if value != given[name]}
