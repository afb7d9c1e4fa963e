"""A decode run's rows → one table and one JSON document. Pure; ratios come before absolutes.

A ratio is taken within one round, arm over ``unfused``, so that drift between rounds cancels; its
interval is that of the median over rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusewise.profiles.intervals import median, median_interval
from fusewise.report.table import Column, Section
from fusewise.shape import format_size

Row = dict[str, Any]

SCHEMA_VERSION = 1

COLUMNS = (
    Column("phase", "phase"),
    Column("tokens", "batch or\ntokens", align="right"),
    Column("size", "message", align="right", drop=2),
    Column("arm", "arm", star=("best", True)),
    Column("path", "path", drop=1),
    Column("graph", "graph", drop=3),
    Column("ratio", "÷ unfused", form=".3f", align="right"),
    Column("ratio_low", "from", form=".3f", align="right"),
    Column("ratio_high", "to", form=".3f", align="right"),
    Column("tokens_per_s", "tokens/s", form=".0f", align="right"),
)


def records(rows: Sequence[Row]) -> list[Row]:
    """Each row with tokens/s, its ratio to ``unfused`` and whether it is of the fastest.

    Arms that run what the fastest runs are as good as it: what lies between them is noise.
    """
    base = {(r["phase"], r["tokens"]): r["times_s"] for r in rows if r["arm"] == "unfused"}
    best: dict[tuple[str, int], Row] = {}
    made = []
    for row in rows:
        key = (row["phase"], row["tokens"])
        pairs = zip(base[key], row["times_s"], strict=True)
        ratio = median_interval([unfused_s / time_s for unfused_s, time_s in pairs])
        tokens_per_s = row["tokens_per_run"] / median(row["times_s"])
        made.append(
            row
            | {
                "size": format_size(row["message_bytes"]),
                "tokens_per_s": tokens_per_s,
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
            }
        )
    for row in made:
        key = (row["phase"], row["tokens"])
        best[key] = max(best.get(key, row), row, key=lambda one: float(one["tokens_per_s"]))
    for row in made:
        row["best"] = _runs(row) == _runs(best[row["phase"], row["tokens"]])
    return made


def _runs(row: Row) -> tuple[str, str]:
    return row["path"], row["graph"]


def section(rows: Sequence[Row], title: str, notes: Sequence[str]) -> Section:
    """The table of a run."""
    flat = [
        {key: value for key, value in record.items() if key != "times_s"}
        for record in records(rows)
    ]
    head = (
        "* fastest at its size, with all arms that run the same. ÷ unfused: above 1 is faster; "
        "median of paired rounds, 95 %."
    )
    data = [{key: value for key, value in row.items() if key != "size"} for row in flat]
    return Section("decode", COLUMNS, flat, title, (head, *notes), data)


def document(
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    arms: Sequence[Mapping[str, Any]],
    sites: Mapping[str, Sequence[str]],
    unreached: Sequence[tuple[str, int]],
    command: str,
    created: str,
    fusewise: str,
) -> dict[str, Any]:
    """Everything measured and everything needed to repeat it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "what": "tokens per second by arm; times_s are whole runs, slowest rank, per round",
        "command": command,
        "created": created,
        "fusewise": fusewise,
        "fingerprint": dict(fingerprint),
        "settings": dict(settings),
        "arms": [dict(arm) for arm in arms],
        "sites": {choice: list(lines) for choice, lines in sites.items()},
        "unreached": [{"phase": phase, "tokens": tokens} for phase, tokens in unreached],
        "rows": records(rows),
    }
