"""Run a comparison in stages: one method with one seed each, in a directory of its own, resumable, skipped when done.

A stage has one part, or a part for each direction where the method trains a model for each. A part keeps its final
model and `part.json` (rows of scores, translations of the test set); checkpoints with optimizer states are removed
when it is done. A stage that fails leaves `failed.json`, and the others continue; the next run tries it again.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import set_seed

from ..adapter.active import active_config
from ..neurons.activations import ActivationCounts
from ..neurons.adapter_file import MASK
from ..neurons.language_pairs import split_pair
from ..translation.evaluation import SCORES, check_lengths, check_scorers, evaluate
from ..translation.identification import record_corpus
from ..translation.results import write_results
from ..translation.runs import digest, load_trained
from ..translation.token_loss import token_losses
from ..translation.trainer import SpecializationTrainingArguments
from ..translation.training import fit
from .methods import EQUAL_SECONDS, MASKED, PER_DIRECTION, UNTRAINED, MethodArguments, build_model, parse_method

PART, FAILED, SETTINGS = "part.json", "failed.json", "comparison.json"
_TRAINING = (
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "temperature"),
    *("lr_scheduler_type", "warmup_steps", "label_smoothing_factor", "weight_decay"),
)


@dataclass
class StageArguments:
    """What is compared, and with which budget; the Trainer's `max_steps` is the number of updates of joint methods."""

    methods: list[str] = field(
        default_factory=list, metadata={"help": "method=number of seeds, or with a knob's value: ours_k=0.9=1."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4], metadata={"help": "Tried by each trained method for a third of the updates."}
    )
    scratch_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3], metadata={"help": "The same, for models trained from scratch."}
    )
    single_updates: int = field(default=1000, metadata={"help": "Updates of a model or LoRA of one direction."})
    bilingual_updates: int = field(default=5000, metadata={"help": "Updates of a bilingual model from scratch."})
    tuning_directions: int = field(
        default=2, metadata={"help": "Directions to tune on, for methods with a model per direction."}
    )
    evaluations: int = field(default=5, metadata={"help": "Evaluations in a run, the best of which is kept."})
    num_beams: int = field(default=5, metadata={"help": "Beams on the test set."})


@dataclass
class Comparison:
    """Everything that all stages share.

    Attributes:
        baseline: the multilingual model that all start from.
        tokenizer: its tokenizer.
        data: "train", "validation", "test" → pair → Dataset with columns "source" and "target".
        stage: the budget.
        method: settings of the methods.
        training: arguments of the Trainer; each run sets the output directory, seed, updates and learning rate itself.
        language_tokens: language code → language token.
        source_tag: what the tag on the source side names.
        pivot: language of the one-to-many and many-to-one groups.
        max_length: truncate training text to this many tokens.

    Raises:
        ImportError: if a target language needs a word segmenter that is not installed.
        ValueError: if the output directory holds stages of a comparison with other settings, or a test sentence is too
            long for the model.
    """

    baseline: Any
    tokenizer: Any
    data: Mapping[str, Mapping[str, Dataset]]
    stage: StageArguments
    method: MethodArguments
    training: SpecializationTrainingArguments
    language_tokens: Mapping[str, str] | None = None
    source_tag: str = "source"
    pivot: str | None = None
    max_length: int = 128

    def __post_init__(self) -> None:
        self.directory = Path(str(self.training.output_dir))
        self.language_pairs = list(self.data["train"])
        check_scorers(split_pair(pair)[1] for pair in self.language_pairs)
        check_lengths(self.baseline, self.tokenizer, self.data["test"], **self.convention())
        self._check_settings()

    def run(self, method: str, seed: int) -> bool:
        """Run one stage unless it is done; return whether it is complete. A failure is recorded, not raised."""
        directory = self.stage_directory(method, seed)
        try:
            rate = None if self._kind(method) in UNTRAINED else self.learning_rate(method)
            for pairs in self._groups(method):
                self._part(method, seed, rate, pairs, self._part_directory(directory, method, pairs))
        except Exception as error:
            write_results(directory, {"error": f"{type(error).__name__}: {error}"}, FAILED)
            return False
        (directory / FAILED).unlink(missing_ok=True)
        return True

    def stage_directory(self, method: str, seed: int) -> Path:
        """Return where a stage keeps its results."""
        return self.directory / method / f"seed-{seed}"

    def final_model(self, method: str, seed: int) -> Any:
        """Return the model of a finished stage, as it was scored.

        Raises:
            ValueError: if the method has a model for each direction, or the final model was not kept.
        """
        if self._per_direction(method):
            raise ValueError(f"{method} has a model for each trained direction, and none for others.")
        if self._kind(method) in UNTRAINED:
            return self._untrained(method, seed)
        directory = self.stage_directory(method, seed)
        kept = [directory / name for name in ("adapter", "model") if (directory / name).is_dir()]
        if not kept:
            raise ValueError(f"The final model was not kept in {directory}.")
        model = self._untrained(method, seed)
        load_trained(model, kept[0])
        return model

    def learning_rate(self, method: str) -> float:
        """Return the learning rate with the lowest validation loss after a third of the updates with seed 0.

        Every trained method gets as many trials as there are rates; a single rate needs none. Trials never see test
        data, and their results are kept beside the stages. "fine_tune_equal_seconds" has the rate of "fine_tune".
        """
        if method == EQUAL_SECONDS:
            return self.learning_rate("fine_tune")
        scratch = self._kind(method) == "bilingual"
        rates = self.stage.scratch_learning_rates if scratch else self.stage.learning_rates
        if len(rates) == 1:
            return rates[0]
        return min(rates, key=lambda rate: self._trial(method, rate))

    def counts(self) -> ActivationCounts:
        """Return the baseline's activations on the validation data, recorded once for all methods."""
        path = self.directory / "identification" / "counts.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            recorded = record_corpus(self.baseline, self.tokenizer, self.data["validation"], **self.convention())
            recorded.save(path)
            write_results(path.parent, {"seconds": time.perf_counter() - started})
        return ActivationCounts.load(path)

    def _check_settings(self) -> None:
        """Record what every stage depends on; raise if the directory holds stages that depend on something else."""
        settings = {
            "baseline": digest(self.baseline.state_dict().items()),
            "language_pairs": self.language_pairs,
            "sentences": {split: [len(rows) for rows in of.values()] for split, of in self.data.items()},
            **{name: value for name, value in vars(self.stage).items() if name != "methods"},
            **vars(self.method),
            **{name: getattr(self.training, name) for name in _TRAINING},
            **{"pivot": self.pivot, "max_length": self.max_length, **self.convention()},
        }
        settings = json.loads(json.dumps(settings))
        path = self.directory / SETTINGS
        if path.is_file():
            # an option that is newer than the stages had its default in them
            defaults = {**vars(StageArguments()), **vars(MethodArguments())}
            before = {**json.loads(json.dumps(defaults)), **json.loads(path.read_text())["settings"]}
            changed = [name for name in settings if before.get(name) != settings[name]]
            if changed:
                raise ValueError(
                    f"{self.directory} holds stages of a comparison with other settings ({', '.join(changed)}). "
                    "Continue with those settings, or choose another output directory."
                )
        write_results(self.directory, {"settings": settings}, SETTINGS)

    def _kind(self, method: str) -> str:
        """Return the method without a knob's value."""
        return parse_method(method, self.method)[0]

    def _per_direction(self, method: str) -> bool:
        return self._kind(method) in PER_DIRECTION

    def _groups(self, method: str) -> list[list[str]]:
        return [[pair] for pair in self.language_pairs] if self._per_direction(method) else [self.language_pairs]

    def _part_directory(self, directory: Path, method: str, pairs: Sequence[str]) -> Path:
        return directory / pairs[0] if self._per_direction(method) else directory

    def _trial(self, method: str, rate: float) -> float:
        """Return the mean validation loss over directions after a third of the updates."""
        directory = self.directory / method / f"trial-{rate:g}"
        if not (directory / "trial.json").is_file():
            groups = self._groups(method)
            if self._per_direction(method):
                groups = groups[:: max(1, len(groups) // self.stage.tuning_directions)][: self.stage.tuning_directions]
            losses: dict[str, float] = {}
            for pairs in groups:
                where = self._part_directory(directory, method, pairs)
                model, _ = self._trained(method, 0, rate, pairs, max(1, self._updates(method, 0) // 3), where)
                losses |= self._losses(model, "validation", pairs)
                shutil.rmtree(where)
            write_results(directory, {"learning_rate": rate, "validation_loss": losses}, "trial.json")
        losses = json.loads((directory / "trial.json").read_text())["validation_loss"]
        mean = sum(losses.values()) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    def _part(self, method: str, seed: int, rate: float | None, pairs: list[str], directory: Path) -> None:
        if (directory / PART).is_file():
            return
        model, spent = self._trained(method, seed, rate, pairs, self._updates(method, seed), directory)
        losses = {split: self._losses(model, split, pairs) for split in ("validation", "test")}
        wrong = [pair for pair in pairs if not math.isfinite(losses["validation"][pair])]
        if wrong:
            raise ValueError(f"The validation loss is not finite in {', '.join(wrong)}: the training diverged.")
        scored = evaluate(
            model,
            self.tokenizer,
            {pair: self.data["test"][pair] for pair in pairs},
            batch_size=self.training.per_device_eval_batch_size,
            num_beams=self.stage.num_beams,
            **self.convention(),
        )
        rows = [
            {
                "method": method,
                "seed": seed,
                "direction": pair,
                "loss": losses["test"][pair],
                "validation_loss": losses["validation"][pair],
                **{name: scored["directions"][pair][name] for name in SCORES},
                **spent,
            }
            for pair in pairs
        ]
        signatures = {
            pair: {k: v for k, v in scored["directions"][pair].items() if k.endswith("signature")} for pair in pairs
        }
        about = {"parts": len(self._groups(method)), "learning_rate": rate, **self._size(model)}
        part = {"rows": rows, "about": about, "signatures": signatures, "translations": scored["translations"]}
        write_results(directory, part, PART)
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def _trained(
        self, method: str, seed: int, rate: float | None, pairs: list[str], updates: int, directory: Path
    ) -> tuple[Any, dict[str, Any]]:
        """Return the method's model, trained on `pairs` and left at its best validation loss, and what that took."""
        set_seed(seed)
        model = self._untrained(method, seed)
        if rate is None:
            return model, {"updates": 0, "seconds": 0.0}
        args = copy.deepcopy(self.training)
        args.output_dir, args.seed, args.data_seed = str(directory), seed, seed
        args.max_steps, args.learning_rate = updates, rate
        args.eval_steps = args.save_steps = max(1, updates // self.stage.evaluations)
        if self._per_direction(method):
            args.gradient_accumulation_steps = 1
        train, validation = ({pair: self.data[split][pair] for pair in pairs} for split in ("train", "validation"))
        metrics = fit(model, self.tokenizer, train, validation, args, max_length=self.max_length, **self.convention())
        return model, {"updates": metrics["updates"], "seconds": metrics["train_runtime"]}

    def _untrained(self, method: str, seed: int) -> Any:
        kind, knobs = parse_method(method, self.method)
        return build_model(kind, self.baseline, self.counts(), knobs, self.pivot, seed)

    def _updates(self, method: str, seed: int) -> int:
        if method == EQUAL_SECONDS:
            return self._updates_in_equal_seconds(seed)
        if self._kind(method) == "bilingual":
            return self.stage.bilingual_updates
        return self.stage.single_updates if self._per_direction(method) else self.training.max_steps

    def _updates_in_equal_seconds(self, seed: int) -> int:
        """Return how many updates fine-tuning makes in the seconds that "ours" took, identification included.

        Raises:
            ValueError: if the stages that were timed are not done.
        """
        spent = {}
        for method in ("ours", "fine_tune"):
            part = self.stage_directory(method, seed) / PART
            if not part.is_file():
                raise ValueError(
                    f"{EQUAL_SECONDS} is as long as 'ours', at the speed of 'fine_tune': run both with seed {seed} "
                    f"first ({method} is not done)."
                )
            spent[method] = json.loads(part.read_text())["rows"][0]
        seconds = spent["ours"]["seconds"] + self._identification_seconds()
        return max(1, round(spent["fine_tune"]["updates"] * seconds / spent["fine_tune"]["seconds"]))

    def _identification_seconds(self) -> float:
        self.counts()
        return json.loads((self.directory / "identification" / "results.json").read_text())["seconds"]

    def _losses(self, model: Any, split: str, pairs: list[str]) -> dict[str, float]:
        rows = {pair: self.data[split][pair] for pair in pairs}
        return token_losses(
            model, self.tokenizer, rows, batch_size=self.training.per_device_eval_batch_size, **self.convention()
        )

    def convention(self) -> dict[str, Any]:
        """Return how text is tagged, for every function that encodes it."""
        return {"language_tokens": self.language_tokens, "source_tag": self.source_tag}

    def _size(self, model: Any) -> dict[str, Any]:
        """Return parameters beyond the baseline's (for a model per direction, of one of them), bytes of masks, and the
        share of neurons that they keep."""
        config = active_config(model)
        encoder, decoder = (len(config.encoder_rows), len(config.decoder_rows)) if config is not None else (0, 0)
        rows = {"encoder": encoder, "decoder": decoder}
        widths = {} if config is None else config.d_ff
        extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in self.baseline.parameters())
        masks = sum(rows[config.stacks[name]] * -(-width // 8) for name, width in widths.items())
        bits = [tensor for name, tensor in model.named_buffers() if MASK in name]
        kept = sum(int(np.unpackbits(packed.numpy(force=True)).sum()) for packed in bits)
        neurons = sum(rows[config.stacks[name]] * width for name, width in widths.items())
        return {"extra_parameters": extra, "mask_bytes": masks, "kept": kept / neurons if neurons else None}


def collect(directory: str | Path) -> dict[str, Any]:
    """Read the stages that a directory holds, finished or not.

    Returns:
        "rows": one per method, seed and direction; "stages": one per method and seed, with its "status" ("done",
        "failed", "not done", or "n of m parts"), its method without a knob's value ("kind"), the "knob" whose value it
        names and the values of all "knobs", and what it took; "trials": one per learning rate tried; "signatures":
        pair → signatures; "translations": method → seed → pair → texts.
    """
    known = _read(Path(directory) / SETTINGS).get("settings", {})
    defaults = MethodArguments(**{name: known[name] for name in vars(MethodArguments()) if name in known})
    counted = _read(Path(directory) / "identification" / "results.json").get("seconds", 0.0)
    found: dict[str, Any] = {"rows": [], "stages": [], "trials": [], "signatures": {}, "translations": {}}
    for place in sorted(Path(directory).glob("*/seed-*")):
        method, seed = place.parent.name, int(place.name.removeprefix("seed-"))
        parts = [json.loads(path.read_text()) for path in sorted([*place.glob(PART), *place.glob(f"*/{PART}")])]
        failed = place / FAILED
        kind, knobs = parse_method(method, defaults)
        knob = method.partition("=")[0].removeprefix(f"{kind}_") if "=" in method else None
        stage = {
            "method": method,
            "seed": seed,
            "status": "not done",
            "kind": kind,
            "knob": knob,
            "knobs": vars(knobs),
        }
        stage["identification_seconds"] = counted if kind in MASKED else 0.0
        stage["tuned_as"] = "fine_tune" if kind == EQUAL_SECONDS else method
        if failed.is_file():
            stage |= {"status": "failed", "error": json.loads(failed.read_text())["error"]}
        if parts:
            spent = {key: sum(part["rows"][0][key] for part in parts) for key in ("updates", "seconds")}
            stage |= {**spent, **parts[0]["about"], "environment": parts[0]["environment"]}
            if stage["status"] != "failed":
                stage["status"] = "done" if len(parts) == stage["parts"] else f"{len(parts)} of {stage['parts']} parts"
        found["stages"].append(stage)
        for part in parts:
            found["rows"] += part["rows"]
            found["signatures"] |= part["signatures"]
            found["translations"].setdefault(method, {}).setdefault(seed, {}).update(part["translations"])
    for path in sorted(Path(directory).glob("*/trial-*/trial.json")):
        trial = json.loads(path.read_text())
        losses = trial["validation_loss"]
        mean = {"validation_loss": sum(losses.values()) / len(losses), "directions": len(losses)}
        found["trials"].append({"method": path.parts[-3], "learning_rate": trial["learning_rate"], **mean})
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
