"""Tables of a comparison, all of them computed from its rows (one per method, seed and direction)."""

from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import hierarchical_bootstrap, paired_differences, spread

Rows = Sequence[Mapping[str, Any]]
CEILINGS = ("bilingual", "fine_tune_single", "ffn_copies")
REFERENCE = "fine_tune"
ENOUGH_LOSS, ENOUGH_CHRF = 0.01, 0.5  # of the loss, and in chrF++


def headroom(rows: Rows) -> dict[str, Any]:
    """Measure what could be gained over joint fine-tuning, that is, whether there is interference to remove.

    Returns:
        "ceilings": one row for each ceiling that has been run, with its gain over joint fine-tuning as a share of the
        loss and in chrF++; "met": whether any of them gains 1 % of the loss or 0.5 chrF++ on average over directions
        (None without a ceiling).
    """
    methods = {row["method"] for row in rows}
    ceilings = []
    for name in CEILINGS if REFERENCE in methods else ():
        if name in methods:
            loss = paired_differences(rows, name, REFERENCE, "loss")[0].mean()
            chrf = paired_differences(rows, name, REFERENCE, "chrf++")[0].mean()
            share = -loss / spread(rows, REFERENCE, "loss")[0]
            enough = bool(share >= ENOUGH_LOSS or chrf >= ENOUGH_CHRF)
            ceilings.append(
                {"ceiling": name, "loss gained, %": 100 * share, "chrF++ gained": chrf, "headroom": enough}
            )
    return {"ceilings": ceilings, "met": any(c["headroom"] for c in ceilings) if ceilings else None}


def premise(measured: Mapping[str, Any]) -> str:
    """Return one line on what the headroom means for the table below it."""
    if measured["met"] is None:
        return (
            "Premise not tested: no ceiling (bilingual, fine_tune_single, ffn_copies) has been run beside fine_tune."
        )
    if measured["met"]:
        return "Premise met: directions interfere with each other, and a ceiling improves on joint fine-tuning."
    return "Premise NOT met: no ceiling improves on joint fine-tuning by 1 % of loss or 0.5 chrF++."


def main_table(rows: Rows, stages: Rows, pivot: str | None) -> list[dict[str, Any]]:
    """Return one row per method: losses and scores by group, the difference from joint fine-tuning, and what it costs.

    Losses are test losses in nats per token, averaged over directions and seeds. Stages that failed, or have only some
    of their parts, are listed in the column "unfinished"; the averages are then over fewer directions.
    """
    table = []
    for method in dict.fromkeys(stage["method"] for stage in stages):
        own_stages = [stage for stage in stages if stage["method"] == method]
        unfinished = [stage for stage in own_stages if stage["status"] != "done"]
        line: dict[str, Any] = {"method": method, "seeds": len(own_stages) - len(unfinished)}
        if any(row["method"] == method for row in rows):
            line |= _scores(rows, method, pivot) | _difference(rows, method)
            begun = [stage for stage in own_stages if "parts" in stage]
            line |= {"extra parameters": begun[0]["extra_parameters"], "mask bytes": begun[0]["mask_bytes"]}
            line |= {"models": begun[0]["parts"], "seconds": sum(stage["seconds"] for stage in begun) / len(begun)}
        states = [f"seed {stage['seed']}: {stage.get('error', stage['status'])}" for stage in unfinished]
        line["unfinished"] = "; ".join(states)
        table.append(line)
    return table


def interference(rows: Rows, method: str) -> list[dict[str, Any]]:
    """Return each direction's gain by a method together with the interference measured there.

    Returns:
        One row per direction: "interference", the loss of joint fine-tuning minus that of the bilingual model
        (positive where sharing hurts), and "difference", the loss of the method minus that of joint fine-tuning; both
        in nats per token, averaged over seeds.
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


def _scores(rows: Rows, method: str, pivot: str | None) -> dict[str, Any]:
    groups = {"all": rows}
    if pivot is not None:
        groups["O2M"] = [row for row in rows if row["direction"].startswith(f"{pivot}-")]
        groups["M2O"] = [row for row in rows if row["direction"].endswith(f"-{pivot}")]
    groups = {name: members for name, members in groups.items() if any(row["method"] == method for row in members)}
    line: dict[str, Any] = {f"loss {name}": spread(members, method, "loss")[0] for name, members in groups.items()}
    line["± loss"] = spread(rows, method, "loss")[1]
    line |= {f"chrF++ {name}": spread(members, method, "chrf++")[0] for name, members in groups.items()}
    return {**line, "BLEU all": spread(rows, method, "bleu")[0]}


def _difference(rows: Rows, method: str) -> dict[str, Any]:
    if method == REFERENCE or not any(row["method"] == REFERENCE for row in rows):
        return {}
    differences, seeds, _ = paired_differences(rows, method, REFERENCE, "loss")
    interval = hierarchical_bootstrap(differences)
    return {
        "Δ loss": interval["mean"],
        "95 %": f"[{interval['low']:+.3f}, {interval['high']:+.3f}]",
        "p": interval["p"],
        "better in": f"{int((differences.mean(0) < 0).sum())}/{differences.shape[1]}",
    }
