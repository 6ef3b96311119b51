"""The end of a run: the table, the verdicts, and one line of JSON. Imports no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_run.log import Event
from gpu_run.verdicts import verdicts

__all__ = ["report", "table"]

HEAD = ("engine", "model", "size", "batch", "dtype", "limit", "ms", "least", "most", "peak MB", "work", "rms error")


def report(events: list[Event], out: Path, rehearsed: bool) -> dict[str, Any]:
    """Print everything that is worth reading, write it to ``out / "gpu.json"``, and return it."""
    rows = [_plain(event) for event in events if event["event"] == "row"]
    failed = [f"{event['part']}: {event['why']}" for event in events if event["event"] == "failed"]
    skipped = [
        f"{event['part']}: {event['what']}" if "what" in event else event["part"] for event in _of(events, "skipped")
    ]
    wrong = [f"{event['part']}: {event['what']}" for event in _of(events, "wrong")]
    found = verdicts(events)
    machine = next((row for row in rows if row["kind"] == "machine"), {})
    print(f"\n{machine.get('card', 'the card is not known')}  {machine.get('versions', '')}")
    print(table(rows))
    print("\nFailed:", *(failed or ["nothing"]), sep="\n  ")
    print("Skipped:", *(skipped or ["nothing"]), sep="\n  ")
    print("Wrong:", *(wrong or ["nothing"]), sep="\n  ")
    print("Goals:", *(f"{one.state:>12}  {one.goal}: {one.detail}" for one in found), sep="\n  ")
    made = {
        "benchmark": "gpu", "rehearsed": rehearsed, "machine": machine, "rows": rows, "failed": failed,
        "skipped": skipped, "wrong": wrong, "verdicts": [one._asdict() for one in found],
    }  # fmt: skip
    (out / "gpu.json").write_text(json.dumps(made, default=str) + "\n")
    return made


def table(rows: list[dict[str, Any]]) -> str:
    """The decodes as a table of text."""
    lines = [HEAD, *(_cells(row) for row in rows if row["kind"] == "decode")]
    widths = [max(len(line[at]) for line in lines) for at in range(len(HEAD))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    named = row["engine"] + (f" ({row['block_values']})" if "block_values" in row else "")
    limit = row.get("limit_name", "") + (f", {row['limit'] / 1e6:.0f} MB" if row.get("limit") else "")
    first = (named, row["model"], str(row["size"]), str(row["batch"]), row["dtype"], limit)
    if "failed" in row:
        return (*first, row["failed"][:60], "", "", "", "", "")
    times = (f"{row[key]:.2f}" for key in ("ms", "ms_least", "ms_most"))
    work = f"{row['work']:.2f}" if "work" in row else ""
    return (
        *first,
        *times,
        f"{row['peak_bytes'] / 1e6:.0f}",
        work,
        f"{row['rms_error']:.2e}" if "rms_error" in row else "",
    )


def _of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _plain(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "event"}
