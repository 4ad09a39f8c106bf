"""Tables of a comparison, all of them computed from its rows (one per method, seed and direction)."""

from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import hierarchical_bootstrap, paired_differences, reference_mean, spread

Rows = Sequence[Mapping[str, Any]]
CEILINGS = ("bilingual", "fine_tune_single", "ffn_copies", "ffn_copies_per_target")
REFERENCE = "fine_tune"
ENOUGH_LOSS, ENOUGH_CHRF = 0.01, 0.5  # of the loss, and in chrF++


def headroom(rows: Rows) -> dict[str, Any]:
    """Measure what could be gained over joint fine-tuning, that is, whether there is interference to remove.

    Returns:
        "ceilings": one row for each ceiling that has been run, with its gain over joint fine-tuning as a share of the
        loss and in chrF++, and how many of its directions are done; "met": whether any that is done in all of them
        gains 1 % of the loss or 0.5 chrF++ on average (None without such a ceiling).
    """
    methods = {row["method"] for row in rows}
    trained = {row["direction"] for row in rows if row["method"] == REFERENCE}
    ceilings: list[dict[str, Any]] = []
    for name in CEILINGS if REFERENCE in methods else ():
        if name in methods:
            differences, _, directions = paired_differences(rows, name, REFERENCE, "loss")
            chrf = paired_differences(rows, name, REFERENCE, "chrf++")[0].mean()
            share = -differences.mean() / reference_mean(rows, name, REFERENCE, "loss")
            line: dict[str, Any] = {"ceiling": name, "directions": f"{len(directions)}/{len(trained)}"}
            line |= {"loss gained, %": 100 * share, "chrF++ gained": chrf}
            line["headroom"] = bool(share >= ENOUGH_LOSS or chrf >= ENOUGH_CHRF)
            ceilings.append(line if len(directions) == len(trained) else {**line, "headroom": "unfinished"})
    done = [line["headroom"] for line in ceilings if line["headroom"] != "unfinished"]
    return {"ceilings": ceilings, "met": any(done) if done else None}


def premise(measured: Mapping[str, Any]) -> str:
    """Return one line on what the headroom means for the table below it."""
    if measured["met"] is None:
        return f"Premise not tested: no ceiling ({', '.join(CEILINGS)}) has been run to its end beside {REFERENCE}."
    if measured["met"]:
        return (
            "Premise met: a ceiling improves on joint fine-tuning. Directions that interfere are one reason, and a "
            "joint model that is not yet trained to its end is another."
        )
    return "Premise NOT met: no ceiling improves on joint fine-tuning by 1 % of loss or 0.5 chrF++."


def main_table(rows: Rows, stages: Rows, trials: Rows = ()) -> list[dict[str, Any]]:
    """Return one row per method: loss and scores, the difference from joint fine-tuning, and what it costs.

    Losses are in nats per token, averaged over directions and seeds, "±" the standard deviation of the seeds' means. A
    difference is over the seeds that both have, so that methods with several seeds and with one are compared in "Δ
    loss, seed 0". Stages that failed, have only some of their parts or have not begun are listed in the column
    "unfinished"; the averages are then over fewer directions.
    """
    tuned = learning_rates(stages, trials)
    table = []
    for method in dict.fromkeys(stage["method"] for stage in stages):
        own_stages = [stage for stage in stages if stage["method"] == method]
        unfinished = [stage for stage in own_stages if stage["status"] != "done"]
        line: dict[str, Any] = {"method": method, "seeds": len(own_stages) - len(unfinished)}
        if any(row["method"] == method for row in rows):
            line |= _scores(rows, method) | difference(rows, method)
            line |= {"learning rate": tuned.get(method), **_costs([stage for stage in own_stages if "parts" in stage])}
        states = [f"seed {stage['seed']}: {stage.get('error', stage['status'])}" for stage in unfinished]
        line["unfinished"] = "; ".join(states)
        table.append(line)
    return table


def interference(rows: Rows, method: str) -> list[dict[str, Any]]:
    """Return each direction's gain by a method together with the interference measured there.

    Returns:
        One row per direction: "interference", the loss of joint fine-tuning minus that of the bilingual model
        (positive where sharing hurts), and "difference", the loss of the method minus that of joint fine-tuning; each
        in nats per token, averaged over the seeds that its two models have.
    """
    gap, _, directions = paired_differences(rows, "bilingual", REFERENCE, "loss")
    gain, _, others = paired_differences(rows, method, REFERENCE, "loss")
    gains = dict(zip(others, gain.mean(0).tolist(), strict=True))
    measured = dict(zip(directions, (-gap.mean(0)).tolist(), strict=True))
    return [
        {"method": method, "direction": d, "interference": measured[d], "difference": gains[d]}
        for d in directions
        if d in gains
    ]


def learning_rates(stages: Rows, trials: Rows) -> dict[str, str]:
    """Return method → the learning rate of its stages, and whether a better one may lie beyond those tried."""
    found = {}
    for stage in stages:
        rate = stage.get("learning_rate")
        tuned_as = stage.get("tuned_as", stage["method"])
        tried = {trial["learning_rate"] for trial in trials if trial["method"] == tuned_as}
        if rate is not None:
            edge = len(tried) > 1 and rate in (min(tried), max(tried))
            found[stage["method"]] = f"{rate:g}" + (" (edge of the grid)" if edge else "")
    return found


def difference(rows: Rows, method: str) -> dict[str, Any]:
    """Return the columns that set a method's losses (lower is better) against those of joint fine-tuning."""
    if method == REFERENCE or not any(row["method"] == REFERENCE for row in rows):
        return {}
    differences, seeds, _ = paired_differences(rows, method, REFERENCE, "loss")
    interval = hierarchical_bootstrap(differences)
    return {
        "Δ loss": interval["mean"],
        "Δ loss, seed 0": float(differences[seeds.index(0)].mean()) if 0 in seeds else None,
        "95 %": f"[{interval['low']:+.4f}, {interval['high']:+.4f}]",
        "p": interval["p"],
        "better in": f"{int((differences.mean(0) < 0).sum())}/{differences.shape[1]}",
    }


def _scores(rows: Rows, method: str) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for column, score in (("loss", "loss"), ("chrF++", "chrf++"), ("BLEU", "bleu")):
        line[f"{column} all"], line[f"± {column}"] = spread(rows, method, score)
    if all("validation_loss" in row for row in rows if row["method"] == method):
        line["validation loss"] = spread(rows, method, "validation_loss")[0]
    return line


def _costs(begun: Rows) -> dict[str, Any]:
    stage = begun[0]
    return {
        "updates": stage["updates"],
        "extra parameters": stage["extra_parameters"],
        "minutes to find subnets": stage.get("identification_seconds", 0) / 60,
        **kept_share(stage),
        "mask bytes": stage["mask_bytes"],
        "models": stage["parts"],
        "seconds": sum(each["seconds"] for each in begun) / len(begun),
    }


def kept_share(stage: Mapping[str, Any]) -> dict[str, float]:
    """Return the column with the share of neurons that a stage's masks keep; none for methods without such masks."""
    return {"kept, %": 100 * stage["kept"]} if stage.get("kept") is not None else {}
