"""The methods of the comparison: which model each one trains, made from the same baseline."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import LoraConfig, get_peft_model

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.activations import ACTIVITY, ATTRIBUTION, ActivationCounts
from ..neurons.controls import Pooled, RandomOverlap, WrongPair, check_exchange
from ..neurons.masks import NeuronMasks
from ..neurons.selection import CumulativeThreshold, RandomMatched, check_share
from ..neurons.specificity import GeneralSpecific, Specificity
from ..translation.arguments import as_mapping
from ..translation.messages import check_positive
from .bottleneck import bottleneck_adapters
from .dropout import set_dropout
from .ffn_copies import ffn_copies
from .gradual import gradual

UNTRAINED = ("baseline", "masks_only")
PER_DIRECTION = ("bilingual", "fine_tune_single", "lora_per_pair")  # a model of its own for each direction
# joint fine-tuning for as many seconds as another method takes, with what it takes to find that one's masks
EQUAL_SECONDS = {"fine_tune_equal_seconds": "ours", "fine_tune_equal_seconds_lass": "lass"}
FFN_COPIES = ("ffn_copies", "ffn_copies_per_target")
# masks of ours, or made from them: these methods share its knobs
OURS = (
    *("ours", "ours_enc", "ours_dec", "factorized", "delta", "low_rank", "update_only", "masks_only", "gradual"),
    *("random", "random_overlap", "wrong_pair", "group", "union"),
)
LASS = ("lass", "lass_shared", "lass_wrong_pair")
WRONG_PAIR = ("wrong_pair", "lass_wrong_pair")  # each pair has the masks of another
METHODS = (
    *("baseline", "fine_tune", *EQUAL_SECONDS, "bilingual", "fine_tune_single", *FFN_COPIES, *OURS),
    *("lora", "lora_per_pair", "adapter_lp", "adapter_fam", *LASS),
    *("general_specific", "specificity_1", "specificity_2", "taylor"),
)
WEIGHTS = "weights"
# what masks are made from: a measure of the baseline's neurons, or the weights of fine-tuned models
IDENTIFIED_BY = {
    **dict.fromkeys((*OURS, "general_specific", "specificity_1", "specificity_2"), ACTIVITY),
    **{"taylor": ATTRIBUTION, "lass": WEIGHTS, "lass_wrong_pair": WEIGHTS},
}
_TRAINABLE = {"masks_only": "none", "delta": "delta", "low_rank": "low_rank", "update_only": "delta"}


@dataclass
class MethodArguments:
    """Settings of the methods."""

    k: float = field(default=0.95, metadata={"help": "Share of activations that the kept neurons make up."})
    rho: float = field(default=0.7, metadata={"help": "Share of general neurons in general_specific."})
    kappa: float = field(default=0.9, metadata={"help": "Threshold of specific neurons in general_specific."})
    alpha: float = field(default=0.5, metadata={"help": "Share of each matrix that lass prunes."})
    r: int = field(default=8, metadata={"help": "Rank of low_rank and lora."})
    adapter_width: int = field(
        default=64, metadata={"help": "Neurons of a bottleneck adapter in adapter_lp and _fam."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Dropout of bilingual, in attention too; if not given, as in the baseline."}
    )
    families: list[str] = field(default_factory=list, metadata={"help": "code=family, for adapter_fam."})
    exchange: list[str] = field(
        default_factory=list, metadata={"help": "code=code: whose masks a language gets in wrong_pair."}
    )

    def __post_init__(self) -> None:
        for name in ("k", "rho", "kappa"):
            check_share(name, getattr(self, name))
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
        check_positive(r=self.r, adapter_width=self.adapter_width)


# settings that a stage's name or a grid may give: what numbers they are, and the methods that have them
_KNOBS: dict[str, tuple[type, tuple[str, ...]]] = {
    "k": (float, (*OURS, "specificity_1", "specificity_2", "taylor")),
    "rho": (float, ("general_specific",)),
    "kappa": (float, ("general_specific",)),
    "alpha": (float, LASS),
    "r": (int, ("low_rank", "lora", "lora_per_pair")),
    "adapter_width": (int, ("adapter_lp", "adapter_fam")),
    "dropout": (float, ("bilingual",)),
}
_KNOWN_KNOBS = f"Knobs: {'; '.join(f'{knob} of ' + ', '.join(methods) for knob, (_, methods) in _KNOBS.items())}."


def seeds_of(words: Sequence[str]) -> dict[str, int]:
    """Return `["fine_tune=3", "ours_k=0.9=1"]` as stage → number of seeds.

    Raises:
        ValueError: if a word has another form.
    """
    split = [word.rpartition("=") for word in words]
    wrong = [word for word, (name, _, number) in zip(words, split, strict=True) if not name or not number.isdecimal()]
    if wrong:
        raise ValueError(f"Expected method=number of seeds, such as fine_tune=3, got {' '.join(wrong)}.")
    names = [name for name, _, _ in split]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"A method is listed once, with its number of seeds; twice are {', '.join(twice)}.")
    return {name: int(number) for name, _, number in split}


def planned_stages(words: Sequence[str], only: str | None = None, seed: int = 0) -> list[tuple[str, int]]:
    """Return the stages to run, seed after seed: (method, seed), or the one that `only` and `seed` name.

    Fine-tuning for as many seconds as another method comes last: its seconds are means over the seeds of both.

    Args:
        words: methods and their numbers of seeds; see `seeds_of`.
        only: a method among them.
        seed: its seed; not used without `only`.

    Raises:
        ValueError: if there is no stage, or not that one.
    """
    seeds = seeds_of(words)
    if not any(seeds.values()):
        raise ValueError("There is nothing to compare: give methods and how many seeds, --methods fine_tune=3 ours=3.")
    if only is None:
        stages = [(name, each) for each in range(max(seeds.values())) for name in seeds if each < seeds[name]]
        return sorted(stages, key=lambda stage: stage[0] in EQUAL_SECONDS)
    if seeds.get(only, 0) <= seed:
        raise ValueError(
            f"--only {only} --seed {seed} is no stage of this comparison; it has "
            f"{', '.join(f'{name} with {number} seeds' for name, number in seeds.items())}."
        )
    return [(only, seed)]


def check_methods(stages: Iterable[str], args: MethodArguments, pivot: str | None) -> None:
    """Check that stages name methods, with the settings that these need.

    Raises:
        ValueError: if there is no such method, knob or number, or a setting is missing or does not fit.
    """
    for stage in stages:
        method, _ = parse_method(stage, args)
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r}. Known methods: {', '.join(METHODS)}.")
        if method in WRONG_PAIR:
            check_exchange(as_mapping(args.exchange))
        if method == "adapter_fam" and not args.families:
            raise ValueError("The method 'adapter_fam' needs the languages' families: families=[en=Germanic, ...].")
        if method == "group" and pivot is None:
            raise ValueError("The method 'group' needs a pivot: it has one mask out of it and one into it.")


def parse_method(stage: str, args: MethodArguments) -> tuple[str, MethodArguments]:
    """Return the method that a stage runs, and its knobs.

    A stage is named after its method, and after a knob's value where that is not the one of `args`: "ours_k=0.9" is
    "ours" with k = 0.9.

    Raises:
        ValueError: if a value is given and there is no such method, knob or number.
    """
    stem, equals, value = stage.partition("=")
    if not equals:
        return stage, args
    method, knob = _method_and_knob(stem)
    return method, replace(args, **{knob: _number(knob, value)})


def settings_of(method: str, args: MethodArguments) -> dict[str, Any]:
    """Return the settings that a method depends on; another method of the same comparison may have other ones."""
    names = [knob for knob, (_, methods) in _KNOBS.items() if method in methods]
    names += ["exchange"] * (method in WRONG_PAIR) + ["families"] * (method == "adapter_fam")
    return {name: getattr(args, name) for name in names}


def knob_grids(words: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return `["ours_k=[0.9, 0.95]"]` as `{"ours": {"k": [0.9, 0.95]}}`: the values to try of a method's knobs.

    Raises:
        ValueError: if there is no such method, knob or number, or the method is not trained, so that none is better.
    """
    grids: dict[str, dict[str, list[Any]]] = {}
    for stem, values in as_mapping(words).items():
        method, knob = _method_and_knob(stem)
        if method in UNTRAINED:
            raise ValueError(f"{method} is not trained, so no value of {knob} can be chosen for it.")
        grids.setdefault(method, {})[knob] = [_number(knob, value) for value in values.strip("[]").split(",")]
    return grids


def _method_and_knob(stem: str) -> tuple[str, str]:
    """Split "ours_k" into "ours" and "k"."""
    for method in METHODS:
        knob = stem.removeprefix(f"{method}_")
        if knob != stem and method in _KNOBS.get(knob, (float, ()))[1]:
            return method, knob
    raise ValueError(f"Expected a method and one of its knobs, such as ours_k=0.9, got {stem!r}. {_KNOWN_KNOBS}")


def _number(knob: str, text: str) -> Any:
    try:
        value = _KNOBS[knob][0](text)
    except ValueError:
        raise ValueError(f"Expected a number for {knob}, such as ours_k=0.9, got {text!r}. {_KNOWN_KNOBS}") from None
    MethodArguments(**{knob: value})  # which checks it, before anything is trained
    return value


def masks_of(
    method: str, counts: ActivationCounts, args: MethodArguments, pivot: str | None, seed: int
) -> NeuronMasks:
    """Return the masks of a method.

    Args:
        method: one of METHODS that has masks of neurons.
        counts: activity or attribution of the baseline on validation data, as IDENTIFIED_BY says.
        args: settings of the methods.
        pivot: language whose two groups of directions "group" distinguishes.
        seed: of the random controls.

    Raises:
        ValueError: if the method is unknown, has no such masks or lacks a setting, or if it needs the other measure.
    """
    check_methods([method], args, pivot)
    if IDENTIFIED_BY.get(method, counts.measure) not in (counts.measure, WEIGHTS):
        raise ValueError(f"{method} is identified by {IDENTIFIED_BY[method]}, but got {counts.measure}.")
    ours = CumulativeThreshold(args.k).select(counts)
    match method:
        case "ours" | "delta" | "low_rank" | "update_only" | "masks_only" | "gradual" | "taylor":
            return ours
        case "ours_enc" | "ours_dec":
            return ours.only("encoder" if method == "ours_enc" else "decoder")
        case "factorized":
            return ours.factorize()
        case "random":
            return RandomMatched(ours, seed).select()
        case "random_overlap":
            return RandomOverlap(ours, seed).select()
        case "wrong_pair":
            return WrongPair(ours, as_mapping(args.exchange)).select()
        case "group":
            return Pooled(ours, pivot).select(counts)
        case "union":
            return Pooled(ours).select(counts)
        case "general_specific":
            return GeneralSpecific(args.rho, args.kappa).select(counts)
        case "specificity_1" | "specificity_2":
            return Specificity(args.k, gamma=int(method[-1])).select(counts)
    raise ValueError(f"The method {method!r} has no masks of neurons.")


def build_model(
    method: str, baseline: Any, counts: ActivationCounts, args: MethodArguments, pivot: str | None, seed: int
) -> Any:
    """Return the model that a method trains, or scores as it is: a copy of the baseline and what the method adds.

    Args:
        method: one of METHODS but those of LASS, whose masks are not of neurons (see `baselines.lass`).
        baseline: the multilingual model that all methods start from; "bilingual" takes its architecture only.
        counts: see `masks_of`.
        args: settings of the methods.
        pivot: see `masks_of`.
        seed: of the random controls. Models that start from scratch are drawn from torch's random state.
    """
    if method == "bilingual":
        fresh = type(baseline)(copy.deepcopy(baseline.config))
        fresh.generation_config = copy.deepcopy(baseline.generation_config)
        if args.dropout is not None:
            set_dropout(fresh, args.dropout)
        return fresh
    model = copy.deepcopy(baseline)
    if method in ("baseline", "fine_tune", "fine_tune_single", *EQUAL_SECONDS):
        return model
    if method in FFN_COPIES:
        per_target = method == "ffn_copies_per_target"
        return ffn_copies(model, counts.language_pairs, counts.source_tag, per_target)
    if method in ("adapter_lp", "adapter_fam"):
        families = as_mapping(args.families) if method == "adapter_fam" else None
        return bottleneck_adapters(model, counts.language_pairs, args.adapter_width, families, counts.source_tag)
    if method in ("lora", "lora_per_pair"):
        lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        return get_peft_model(model, lora)
    if method == "gradual":
        return gradual(model, counts, args.k)
    config = NeuronSpecializationConfig(
        masks=masks_of(method, counts, args, pivot, seed),
        trainable=_TRAINABLE.get(method, "full"),
        update_only=method == "update_only",
        r=args.r,
        source_tag=counts.source_tag,
        task_type="SEQ_2_SEQ_LM",
    )
    return get_peft_model(model, config)
