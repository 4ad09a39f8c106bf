"""Run a comparison in stages: one method with one seed each, in a directory of its own, resumable, skipped when done.

A stage has one part, or a part for each direction where the method trains a model for each. A part keeps its final
model and `part.json` (rows of scores, translations of the test set); checkpoints with optimizer states are removed
when it is done. A stage that fails leaves `failed.json`, and the others continue; the next run tries it again.
"""

import json
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from ..adapter.active import active_config
from ..neurons.adapter_file import MASK
from ..neurons.card_sections import CardFacts, facts_of_stage
from ..neurons.language_pairs import split_pair
from ..neurons.lora_card import describe_lora, is_lora
from ..neurons.training_facts import training_facts
from ..translation.encoding import text_digest
from ..translation.evaluation import check_lengths, check_scorers
from ..translation.results import write_results
from ..translation.runs import RUN_FILE, configuration, load_trained, planned_updates, tensor_digest
from . import lass
from .folders import alone, identification_seconds, in_use, remove_checkpoints
from .methods import EQUAL_SECONDS, IDENTIFIED_BY, MethodArguments, seeds_of
from .models import Models
from .scored_part import scored_part
from .settings import StageArguments, check_settings, recorded_settings, shared_arguments
from .trials import TRIAL, Setting, depends_on

PART, FAILED, SETTINGS = "part.json", "failed.json", "comparison.json"
# settings that are recorded for each method by itself
_OF_METHODS = ("methods", "learning_rates", "scratch_learning_rates", "knobs")


@dataclass
class Comparison(Models):
    """A comparison by stages, in the output directory of the training arguments; see `Models` for the attributes.

    Raises:
        ImportError: if a target language needs a word segmenter that is not installed.
        ValueError: if the output directory holds stages of a comparison with other settings, a sentence of validation
            or test data is too long for the model, a grid of knobs is malformed, or a listed method is unknown or
            lacks a setting.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorers(split_pair(pair)[1] for pair in self.language_pairs)
        for split in ("validation", "test"):
            check_lengths(self.baseline, self.tokenizer, self.data[split], **self.convention(), losses=True)
        self._check_settings()
        begun = self._begun()
        self._check_settings_of([method for method in seeds_of(self.stage.methods) if method in begun])

    def run(self, method: str, seed: int) -> bool:
        """Run one stage unless it is done; return whether it is complete. A failure is recorded, not raised.

        Another process that runs the same stage is waited for.

        Raises:
            ValueError: if there is no such knob, or if this method or one that it depends on had other settings.
        """
        directory = self.stage_directory(method, seed)
        self._check_settings_of([method])
        try:
            self.check([method])
            with alone(self.directory, f"{method}-seed-{seed}"):
                setting = self.setting(method)
                for pairs in self.groups(method):
                    self._part(method, seed, setting, pairs, self.part_directory(directory, method, pairs))
        except Exception as error:
            failure = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            write_results(directory, failure, FAILED)
            return False
        (directory / FAILED).unlink(missing_ok=True)
        return True

    def run_all(self, stages: Iterable[tuple[str, int]]) -> list[str]:
        """Run each stage (method, seed) that is not done, say so, and return which failed, and why."""
        failed, waiting, postponed = [], list(stages), set()
        while waiting:
            method, seed = waiting.pop(0)
            print(f"\n== {method}, seed {seed}", flush=True)
            if (method, seed) not in postponed and in_use(self.directory, f"{method}-seed-{seed}"):
                print("runs in another process; later", flush=True)
                postponed.add((method, seed))
                waiting.append((method, seed))
                waiting.sort(key=lambda stage: stage[0] in EQUAL_SECONDS)  # they are timed by the others
                continue
            if self.run(method, seed):
                print("done", flush=True)
            else:
                error = json.loads((self.stage_directory(method, seed) / FAILED).read_text(encoding="utf-8"))["error"]
                failed.append(f"{method}, seed {seed} ({error})")
                print(f"FAILED: {error}; more in {FAILED}", flush=True)
        return failed

    def stage_directory(self, method: str, seed: int) -> Path:
        """Return where a stage keeps its results."""
        return self.directory / method / f"seed-{seed}"

    def final_model(self, method: str, seed: int) -> Any:
        """Return the model of a finished stage, as it was scored.

        Raises:
            ValueError: if the method has a model for each direction, or the final model was not kept.
        """
        if self.per_direction(method):
            raise ValueError(f"{method} has a model for each trained direction, and none for others.")
        setting = self.setting(method)
        model = self.untrained(method, seed, setting.knobs)
        if setting.learning_rate is not None:
            directory = self.stage_directory(method, seed)
            kept = [directory / name for name in ("adapter", "model") if (directory / name).is_dir()]
            if not kept:
                raise ValueError(f"The final model was not kept in {directory}.")
            load_trained(model, kept[0])
        return model

    def _check_settings(self) -> None:
        """Record what every stage depends on; raise if the directory holds stages that depend on something else."""
        settings = {
            "baseline": tensor_digest(self.baseline.state_dict().items()),
            "configuration": configuration(self.baseline),
            "language_pairs": self.language_pairs,
            "sentences": {split: [len(rows) for rows in of.values()] for split, of in self.data.items()},
            "text": {split: text_digest(of) for split, of in self.data.items()},
            **{name: value for name, value in vars(self.stage).items() if name not in _OF_METHODS},
            **shared_arguments(self.training),
            **{"pivot": self.pivot, "max_length": self.max_length, **self.convention()},
        }
        check_settings(self.directory, SETTINGS, settings, vars(StageArguments()))

    def _check_settings_of(self, methods: Sequence[str]) -> None:
        """The same for what these methods depend on beyond that; another method may have other settings."""
        settings: dict[str, Any] = {}
        for method in methods:
            settings |= depends_on(method, self.method, self.stage)
        recorded = recorded_settings(self.directory, SETTINGS)
        earlier: dict[str, Any] = {}
        if "k" in recorded:  # by an earlier version, once for all methods that it ran
            args = MethodArguments(**{name: recorded[name] for name in vars(self.method) if name in recorded})
            stage = StageArguments(**{name: recorded[name] for name in vars(self.stage) if name in recorded})
            for method in self._begun():
                earlier |= depends_on(method, args, stage)
        known = {name.partition(" of ")[2] for name in recorded}
        begun = [method for method in self._begun() if method in known]
        needed = {name for method in begun for name in depends_on(method, self.method, self.stage)}
        check_settings(self.directory, SETTINGS, settings, earlier, free=set(settings) - needed)

    def _begun(self) -> list[str]:
        """Return the methods that have trained or scored something; settings of one that only failed may change."""
        kept = {
            path.relative_to(self.directory).parts[0]
            for of in ("seed-*", "trial-*")
            for name in (PART, TRIAL, RUN_FILE)
            for path in self.directory.glob(f"*/{of}/**/{name}")
        }
        return sorted(kept)

    def _part(self, method: str, seed: int, setting: Setting, pairs: list[str], directory: Path) -> None:
        if (directory / PART).is_file():
            return
        if seed == 0:
            self.trials.adopt(method, setting, pairs, directory)
        updates = self.updates(method)
        if method in EQUAL_SECONDS:  # fixed once it has begun: more seeds may have been timed since
            updates = planned_updates(directory) or self._updates_in_equal_seconds(method)
        model, spent = self.trained(method, seed, setting, pairs, updates, directory)
        while_training = spent.pop("validation_losses", [])
        scored = scored_part(
            *(model, self.tokenizer, self.data, pairs, {"method": method, "seed": seed}),
            batch_size=self.training.per_device_eval_batch_size,
            num_beams=self.stage.num_beams,
            **self.convention(),
        )
        scored["rows"] = [{**row, **spent} for row in scored["rows"]]
        models = len(self.groups(method))
        about = {
            "parts": models,
            "learning_rate": setting.learning_rate,
            "knobs": vars(setting.knobs),
            **size_of(self.baseline, model, models, self.kind(method) in IDENTIFIED_BY),
            "validation_losses": while_training,
        }
        if is_lora(directory / "model"):  # PEFT leaves its card empty
            facts = CardFacts(training=training_facts(directory / RUN_FILE), **facts_of_stage(scored))
            describe_lora(directory / "model", facts)
        remove_checkpoints(directory)
        write_results(directory, {**scored, "about": about}, PART)  # last: it says that the part is done

    def _updates_in_equal_seconds(self, method: str) -> int:
        """Return how many updates fine-tuning makes in the seconds of another method, finding its masks included.

        Means over the seeds that both have: single runs on a shared machine differ by more than the methods do.

        Raises:
            ValueError: if the stages that were timed are not done.
        """
        timed = EQUAL_SECONDS[method]
        done = {
            name: {part.parent.name: part for part in self.directory.glob(f"{name}/seed-*/{PART}")}
            for name in (timed, "fine_tune")
        }
        both = sorted(set.intersection(*map(set, done.values())))
        if not both:
            raise ValueError(
                f"{method} is as long as {timed!r} at the speed of 'fine_tune': run both with the same seed first."
            )
        first = {
            name: [json.loads(of[seed].read_text(encoding="utf-8"))["rows"][0] for seed in both]
            for name, of in done.items()
        }
        means = {name: sum(row["seconds"] for row in rows) / len(both) for name, rows in first.items()}
        seconds = means[timed] + identification_seconds(self.directory, timed)
        return max(1, round(first["fine_tune"][0]["updates"] * seconds / means["fine_tune"]))


def size_of(baseline: Any, model: Any, models: int = 1, masked: bool = True) -> dict[str, Any]:
    """Return parameters beyond the baseline's, bytes of masks, and the share of neurons that they keep.

    Args:
        baseline: that the method starts from.
        model: what it trained.
        models: how many of them the method has; adapters of PEFT's share the baseline.
        masked: whether masks choose neurons, rather than route to modules of a pair's own.
    """
    of_baseline, of_model = (sum(p.numel() for p in each.parameters()) for each in (baseline, model))
    shared = of_baseline if isinstance(model, PeftModel) else 0
    extra = models * (of_model - shared) + shared - of_baseline
    of_weights = lass.mask_bytes(model)
    if of_weights or not masked:
        return {"extra_parameters": extra, "mask_bytes": of_weights, "kept": None}
    config = active_config(model)
    encoder, decoder = (len(config.encoder_rows), len(config.decoder_rows)) if config is not None else (0, 0)
    rows = {"encoder": encoder, "decoder": decoder}
    widths = {} if config is None else config.d_ff
    masks = sum(rows[config.stacks[name]] * -(-width // 8) for name, width in widths.items())
    bits = [tensor for name, tensor in model.named_buffers() if MASK in name]
    kept = sum(int(np.unpackbits(packed.numpy(force=True)).sum()) for packed in bits)
    neurons = sum(rows[config.stacks[name]] * width for name, width in widths.items())
    return {"extra_parameters": extra, "mask_bytes": masks, "kept": kept / neurons if neurons else None}
