"""Was the comparison fair? What its reader should know before the tables."""

from collections.abc import Mapping

from .comparison import Rows, learning_rates


def budget_facts(stages: Rows, trials: Rows, baseline: Mapping[str, int | None] | None) -> list[str]:
    """Return sentences on how long the baseline was trained, and on equal updates and learning rates of the methods.

    Args:
        stages: one per method and seed, as `collect` returns.
        trials: one per learning rate tried.
        baseline: its "updates", "max_steps" and "patience"; None where that is unknown.
    """
    return [_baseline(baseline), *_updates(stages), *_diverged(stages), *_learning_rates(stages, trials)]


def _baseline(training: Mapping[str, int | None] | None) -> str:
    if training is None:
        return "Baseline: unknown whether it was trained to patience (no run.json or results.json stands beside it)."
    updates, limit, patience = training["updates"], training["max_steps"], training["patience"]
    if patience is not None and updates is not None and limit is not None and updates < limit:
        return f"Baseline: trained until {patience} validations in a row were no better ({updates} updates)."
    return f"Baseline: NOT trained to patience; it stopped at the maximum of {limit} updates."


def _updates(stages: Rows) -> list[str]:
    joint: dict[int, list[str]] = {}
    for stage in stages:
        if stage.get("parts") == 1 and stage["updates"] and stage["status"] == "done":
            methods = joint.setdefault(stage["updates"], [])
            methods += [stage["method"]] if stage["method"] not in methods else []
    if not joint:
        return []
    shown = "; ".join(f"{updates} ({', '.join(methods)})" for updates, methods in sorted(joint.items()))
    return [f"Updates of joint methods: {shown}. Equal updates are on the same batches in one order: equal tokens."]


def _diverged(stages: Rows) -> list[str]:
    """Such a run keeps the weights of its best validation, and would look like a method that learns little."""
    found = [
        f"{stage['method']}, seed {stage['seed']}"
        for stage in stages
        if any(loss is None for _, loss in stage.get("validation_losses", []))
    ]
    return [f"WARNING, diverged after the validation that they are left at: {'; '.join(found)}."] if found else []


def _learning_rates(stages: Rows, trials: Rows) -> list[str]:
    chosen = learning_rates(stages, trials)
    tuned_as = {stage["method"]: stage.get("tuned_as", stage["method"]) for stage in stages}
    numbers = {method: sum(trial["method"] == tuned_as[method] for trial in trials) for method in chosen}
    edge = [f"{method} {rate.split()[0]}" for method, rate in chosen.items() if "edge" in rate]
    rates = {m: {trial["learning_rate"] for trial in trials if trial["method"] == tuned_as[m]} for m in chosen}
    untuned = [method for method, tried in rates.items() if len(tried) < 2]
    facts = []
    if edge:
        facts.append(
            f"WARNING, learning rates on the edge of the grid, beyond which a better one may lie: {', '.join(edge)}."
        )
    if len({number for number in numbers.values() if number >= 2}) > 1:
        facts.append(f"WARNING, unequal numbers of trials: {', '.join(f'{m} {n}' for m, n in numbers.items())}.")
    if untuned:
        facts.append(f"Learning rates given, not tuned: {', '.join(untuned)}.")
    return facts
