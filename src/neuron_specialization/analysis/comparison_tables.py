"""Further tables of a comparison: by tier of resources, interference closed, sweeps of a knob, zero-shot."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..neurons.language_pairs import split_pair
from .comparison import REFERENCE, Rows, difference, interference, kept_share
from .statistics import paired_differences, spread


def usable_rows(rows: Rows, stages: Rows) -> list[Mapping[str, Any]]:
    """Return the rows of finished stages, and of a method without any those of its stage that has the most."""
    used = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own_rows = [row for row in rows if row["method"] == method]
        done = {stage["seed"] for stage in stages if stage["method"] == method and stage["status"] == "done"}
        seeds = [row["seed"] for row in own_rows]
        done = done or {max(seeds, key=seeds.count)}
        used += [row for row in own_rows if row["seed"] in done]
    return used


def group_table(
    rows: Rows, score: str, pivot: str | None, tiers: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """Return one row per method and one column per group: of joint fine-tuning the score, of others the difference.

    Args:
        rows: one per method, seed and direction.
        score: name of a number in each row.
        pivot: language of the one-to-many (O2M) and many-to-one (M2O) groups.
        tiers: name → languages with as much data; a direction is in the tier of all its languages but the pivot.
    """
    groups = _groups(list(dict.fromkeys(row["direction"] for row in rows)), pivot, tiers or {})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    absolute = [REFERENCE] if REFERENCE in methods else methods
    table = []
    for method in [*absolute, *(name for name in methods if name not in absolute)]:
        line: dict[str, Any] = {"method": method}
        for name, directions in groups.items():
            members = [row for row in rows if row["direction"] in directions]
            if not any(row["method"] == method for row in members):
                continue
            if method in absolute:
                line[name] = spread(members, method, score)[0]
            elif any(row["method"] == REFERENCE for row in members):
                line[name] = float(paired_differences(members, method, REFERENCE, score)[0].mean())
        table.append(line)
    return table


def interference_table(rows: Rows) -> list[dict[str, Any]]:
    """Return one row per direction: the interference in nats per token, and each method's share of it that is gone.

    Interference is the loss of joint fine-tuning minus that of the bilingual model, where that is positive; elsewhere
    there is nothing to remove, and the shares are left out. The last row is over the directions with interference: its
    share is that of the sums, so that directions with next to none do not decide.
    """
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name not in (REFERENCE, "bilingual")]
    lines: dict[str, dict[str, Any]] = {}
    total: dict[str, Any] = {"direction": "all with interference"}
    for method in methods:
        points = interference(rows, method)
        for point in points:
            line = lines.setdefault(point["direction"], {"direction": point["direction"]})
            line["interference, loss"] = point["interference"]
            if point["interference"] > 0:
                line[f"{method}, %"] = -100 * point["difference"] / point["interference"]
        hurt = [point for point in points if point["interference"] > 0]
        if hurt:
            gap = sum(point["interference"] for point in hurt)
            total["interference, loss"] = gap / len(hurt)
            total[f"{method}, %"] = -100 * sum(point["difference"] for point in hurt) / gap
    return [*lines.values(), *([total] if len(total) > 1 else [])]


def sweep_table(rows: Rows, stages: Rows) -> list[dict[str, Any]]:
    """Return one row per value of each knob that was swept, in order: stages named "ours_k=0.9", and "ours" itself."""
    swept = {(stage["kind"], stage["knob"]) for stage in stages if stage.get("knob")}
    table = []
    for kind, knob in sorted(swept):
        of_kind = [s for s in stages if s.get("kind") == kind and s.get("knob") in (knob, None)]
        of_kind.sort(key=lambda s: "parts" in s)  # what was tuned is known of those that were trained
        named = {s["method"]: s for s in of_kind if s["knobs"].get(knob) is not None}  # None: as in the baseline
        for method, stage in sorted(named.items(), key=lambda item: item[1]["knobs"][knob]):
            if any(row["method"] == method for row in rows):
                line = {"method": kind, "knob": knob, "value": f"{stage['knobs'][knob]:g}", **kept_share(stage)}
                line |= {"loss": spread(rows, method, "loss")[0], **difference(rows, method)}
                table.append({**line, "chrF++": spread(rows, method, "chrf++")[0], "stage": method})
    return table


def curves_table(stages: Rows) -> list[dict[str, Any]]:
    """Return one row per joint method: its validation loss after so many updates, minus that of joint fine-tuning.

    Of joint fine-tuning it is the loss itself. Means over the seeds that both have.
    """
    curves: dict[str, dict[int, list[list[float]]]] = {}
    for stage in stages:
        if stage["status"] == "done" and stage["parts"] == 1 and stage.get("validation_losses"):
            curves.setdefault(stage["method"], {})[stage["seed"]] = stage["validation_losses"]
    reference = curves.pop(REFERENCE, {})
    table = []
    for method, own in {REFERENCE: reference, **curves}.items():
        seeds = [seed for seed in own if [u for u, _ in own[seed]] == [u for u, _ in reference.get(seed, [])]]
        line: dict[str, Any] = {"method": method, "seeds": len(seeds)}
        for i, (updates, _) in enumerate(own[seeds[0]] if seeds else []):
            both = [(own[seed][i][1], 0 if method == REFERENCE else reference[seed][i][1]) for seed in seeds]
            diverged = any(None in losses for losses in both)
            line[f"after {updates}"] = (
                None if diverged else sum(loss - of_reference for loss, of_reference in both) / len(both)
            )
        table += [line] if seeds else []
    return table


def sizes_table(rows: Mapping[str, Rows], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per size of the model and method: mean interference and difference from joint fine-tuning.

    The last row of a method has Spearman's rank correlation of the two over all directions and sizes, where there are
    three points or more. Points of one direction at several sizes are not independent, so it has no p-value.

    Args:
        rows: size → rows of its comparison, with "bilingual" and joint fine-tuning among them.
        methods: whose difference is set against the interference.
    """
    from scipy.stats import spearmanr  # an optional dependency

    table = []
    for method in methods:
        points: list[dict[str, Any]] = []
        for size, of in rows.items():
            if any(row["method"] == method for row in of):
                here = interference(of, method)
                table.append({"method": method, "size": size, **_means(here)})
                points += here
        across, up = ([point[key] for point in points] for key in ("interference", "difference"))
        if len(points) > 2 and len(set(across)) > 1 and len(set(up)) > 1:
            rho = float(spearmanr(across, up).statistic)
            table.append({"method": method, "size": "all", **_means(points), "rank correlation": rho})
    return table


def zero_shot_table(rows: Rows, not_applicable: Mapping[str, str], pivot: str | None) -> list[dict[str, Any]]:
    """Return one row per method, over the directions that it and joint fine-tuning were scored in with every seed.

    Args:
        rows: one per method, seed, direction and route, as `collect_zero_shot` returns.
        not_applicable: method → why it has no rows.
        pivot: what the rows with the route "pivot" go through.
    """
    named = _named_by_route(rows, pivot)
    table = []
    for method in dict.fromkeys(row["method"] for row in named):
        both = _complete(named, [method] if method == REFERENCE else [method, REFERENCE])
        own_rows = [row for row in both if row["method"] == method]
        if not own_rows:
            continue
        line: dict[str, Any] = {"method": method, "seeds": len({row["seed"] for row in own_rows})}
        line["directions"] = len({row["direction"] for row in own_rows})
        compared = method != REFERENCE and len(own_rows) < len(both)
        if own_rows[0]["loss"] is not None:
            line["loss"] = spread(own_rows, method, "loss")[0]
            line |= difference(both, method) if compared else {}
        for column, score in (("chrF++", "chrf++"), ("BLEU", "bleu")):
            line[column] = spread(own_rows, method, score)[0]
        if compared:
            gains = paired_differences(both, method, REFERENCE, "chrf++")[0].mean(0)
            line["chrF++ better in"] = f"{int((gains > 0).sum())}/{len(gains)}"
        if all("off_target" in row for row in own_rows):
            line["off-target, %"] = 100 * spread(own_rows, method, "off_target")[0]
        else:
            line["off-target, %"] = "n/a"
        table.append(line)
    references = {row["direction"]: row["off_target_references"] for row in rows if "off_target_references" in row}
    if references:
        share = 100 * sum(references.values()) / len(references)
        table.append({"method": "(references)", "directions": len(references), "off-target, %": share})
    there = {row["method"] for row in rows}
    return table + [{"method": name, "n/a": why} for name, why in not_applicable.items() if name not in there]


def zero_shot_directions(rows: Rows, pivot: str | None) -> list[dict[str, Any]]:
    """Return one row per direction and one column per method: chrF++, averaged over seeds."""
    lines: dict[str, dict[str, Any]] = {}
    named = _named_by_route(rows, pivot)
    for direction in dict.fromkeys(row["direction"] for row in named):
        here = [row for row in named if row["direction"] == direction and row["chrf++"] is not None]
        means = {method: spread(here, method, "chrf++")[0] for method in dict.fromkeys(row["method"] for row in here)}
        lines[direction] = {"direction": direction, **means}
    return list(lines.values())


def _means(points: Rows) -> dict[str, Any]:
    columns = (("interference, loss", "interference"), ("Δ loss", "difference"))
    means = {column: sum(point[key] for point in points) / len(points) for column, key in columns}
    better = sum(point["difference"] < 0 for point in points)
    return {"points": len(points), **means, "better in": f"{better}/{len(points)}"}


def _groups(directions: Sequence[str], pivot: str | None, tiers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return column → directions, without empty ones."""
    groups = {}
    for tier, languages in {**tiers, "all": None}.items():
        members = [d for d in directions if languages is None or set(split_pair(d)) - {pivot} <= set(languages)]
        if pivot is not None:
            groups[f"{tier} O2M"] = [d for d in members if split_pair(d)[0] == pivot]
            groups[f"{tier} M2O"] = [d for d in members if split_pair(d)[1] == pivot]
        groups[f"{tier} Avg"] = members
    return {name: members for name, members in groups.items() if members}


def _named_by_route(rows: Rows, pivot: str | None) -> list[dict[str, Any]]:
    """Return rows in which what went through the pivot is a method of its own."""
    return [
        {**row, "method": f"{row['method']}, through {pivot}" if row["route"] == "pivot" else row["method"]}
        for row in rows
    ]


def comparable(rows: Rows) -> list[Mapping[str, Any]]:
    """Return the rows of each method in the directions that all seeds of it and of joint fine-tuning have.

    What was cut off, or is being scored still, has some directions only.
    """
    known = {row["direction"] for row in _complete(rows, [REFERENCE])}
    methods = dict.fromkeys(row["method"] for row in rows)
    return [row for method in methods for row in _complete(rows, [method]) if row["direction"] in known]


def _complete(rows: Rows, methods: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the rows of methods in the directions that all of their seeds have; a method without rows is left out."""
    own_rows = [row for row in rows if row["method"] in methods]
    stages = {(row["method"], row["seed"]) for row in own_rows}
    counts: dict[str, int] = {}
    for row in own_rows:
        counts[row["direction"]] = counts.get(row["direction"], 0) + 1
    return [row for row in own_rows if counts[row["direction"]] == len(stages)]
