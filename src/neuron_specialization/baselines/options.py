"""Which stages of a comparison one call runs, and how it shows them."""

from dataclasses import dataclass, field

from ..neurons.language_pairs import split_pair
from ..translation.arguments import DataArguments, as_mapping
from ..translation.trainer import SpecializationTrainingArguments
from .zero_shot import ZeroShotArguments


@dataclass
class CompareArguments:
    """Which stages to run now, and how to show them."""

    only: str | None = field(default=None, metadata={"help": "Run this method only, with the seed given by --seed."})
    tables_only: bool = field(default=False, metadata={"help": "Only make the tables again."})
    zero_shot_only: bool = field(default=False, metadata={"help": "Run no stage: score zero-shot directions."})
    report: str | None = field(default=None, metadata={"help": "HTML file that shows the masks and results."})
    tiers: list[str] = field(
        default_factory=list, metadata={"help": "tier=languages of its directions, such as low=fi,vi."}
    )

    @property
    def languages_of_tiers(self) -> dict[str, list[str]]:
        """Tier → its languages."""
        return {name: languages.split(",") for name, languages in as_mapping(self.tiers).items()}


def check_options(
    compare: CompareArguments, zero: ZeroShotArguments, data: DataArguments, training: SpecializationTrainingArguments
) -> None:
    """Check that every option has an effect beside the others.

    Raises:
        ValueError: if one has none, or a tier names a language of no direction.
    """
    if compare.tables_only and (compare.only is not None or compare.zero_shot_only):
        raise ValueError("--tables_only true runs and scores nothing: leave out --only and --zero_shot_only.")
    if compare.only is not None and compare.report is not None:
        raise ValueError("--only leaves tables and the report to a later call: leave out --report.")
    if compare.only is None and training.seed != type(training).seed:
        raise ValueError("--seed names a stage, together with --only. All seeds of --methods run without them.")
    if compare.zero_shot_only and not zero.zero_shot_pairs:
        raise ValueError("--zero_shot_only true scores directions that are not trained: give --zero_shot_pairs.")
    known = {code for pair in data.language_pairs for code in split_pair(pair)}
    unknown = sorted({code for codes in compare.languages_of_tiers.values() for code in codes} - known)
    if unknown:
        raise ValueError(f"--tiers names languages of no direction: {', '.join(unknown)}.")
