"""What the rows say about each goal: reached, missed and by how much, or not measured. Imports no PyTorch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from gpu_run.log import Event

__all__ = ["Verdict", "verdicts"]

REACHED, MISSED, NOT_MEASURED = "reached", "missed", "not measured"
PUBLISHED = {1024: 29.2, 2048: 168.5}
"""Milliseconds that SGLang's path takes for FLUX.2's decoder on an H200, by sglang's pull request 33451."""


class Verdict(NamedTuple):
    """One goal, and what was found."""

    goal: str
    state: str
    detail: str


def verdicts(events: list[Event]) -> list[Verdict]:
    """Return a verdict for each goal, from all events of one run or of several."""
    rows = [event for event in events if event["event"] == "row"]
    wrong = [event for event in events if event["event"] == "wrong"]
    goals: list[tuple[str, Callable[[list[Event]], tuple[str, str]]]] = [
        ("pytest -m gpu passes", _pytest),
        ("compute-sanitizer finds nothing", _sanitizer),
        ("the same bits for any limit, batch and run", _same_bits),
        ("1024: no slower than the fastest peer", lambda rows: _against_peers(rows, 1024, 1.0)),
        ("1024: the same within a third of diffusers' memory", lambda rows: _against_peers(rows, 1024, 1.0, "third")),
        ("1024: at least 3 times as fast as diffusers eager", _against_eager),
        ("2048: at least 1.1 times as fast as the fastest peer", lambda rows: _against_peers(rows, 2048, 1.1)),
        ("FLUX.2, 1024: no slower than SGLang", lambda rows: _against_peers(rows, 1024, 1.0, model="flux2")),
        ("4096: within 4 GB", _within),
        ("4096: a first number without a limit", _without),
        ("1024: an error no larger than diffusers'", _error),
        ("beside a pipeline: the whole card's peak", _whole_card),
        ("the ten longest kernels and their bounds", _kernels),
    ]
    found = [Verdict(goal, *judge(rows)) for goal, judge in goals]
    kept = (REACHED, "all peaks") if any(map(_ours, rows)) else (NOT_MEASURED, "no decode")
    above = [event["what"] for event in wrong if "the peak is" in event["what"]]
    return [*found, Verdict("no peak above its limit", *((MISSED, "; ".join(above)) if above else kept))]


def _pytest(rows: list[Event]) -> tuple[str, str]:
    row = _last(rows, kind="pytest")
    if row is None:
        return NOT_MEASURED, "it did not run, or not to its end"
    passed = row["tests"] - row["failures"] - row["errors"] - row["skipped"]
    good = passed > 0 and not row["failures"] and not row["errors"] and not row["skipped"]
    return (REACHED if good else MISSED), f"{passed} of {row['tests']} passed, {row['skipped']} skipped"


def _sanitizer(rows: list[Event]) -> tuple[str, str]:
    row = _last(rows, kind="sanitizer")
    if row is None:
        return NOT_MEASURED, "run --sanitize"
    good = row["errors"] == 0 and row["exit_status"] == 0
    return (REACHED if good else MISSED), f"{row['errors']} errors in {row['decodes']} pairs of decodes"


def _same_bits(rows: list[Event]) -> tuple[str, str]:
    digests: dict[Any, set[str]] = defaultdict(set)
    count, unlike = 0, []
    for row in rows:
        if _ours(row) and "digest" in row:
            digests[row["model"], row["size"], row["dtype"]].add(row["digest"])
            count += 1
            unlike += [] if row.get("alike", True) else [f"a batch of {row['batch']} at {row['size']}"]
        elif row.get("kind") == "smoke":
            digests["flux", 1024, "bfloat16"].add(row["digest"])
            unlike += [] if row["same_bits"] else ["two decodes of one engine"]
    unlike += [f"{len(names)} images for {key}" for key, names in digests.items() if len(names) > 1]
    if count < 2:
        return NOT_MEASURED, f"{count} decodes"
    return (MISSED, "; ".join(unlike)) if unlike else (REACHED, f"{count} rows, {len(digests)} images")


def _against_peers(
    rows: list[Event], size: int, factor: float, limit: str = "none", model: str = "flux"
) -> tuple[str, str]:
    ours = _best(rows, size, model, lambda row: _ours(row) and row.get("limit_name") == limit)
    graphs = _best(rows, size, model, lambda row: row["engine"] == "fluxvae graphs")
    names = ("sglang", "diffusers compiled")
    peers = {name: _best(rows, size, model, lambda row, name=name: row["engine"].startswith(name)) for name in names}
    measured = [row for row in peers.values() if row is not None]
    if ours is None or not measured:
        return NOT_MEASURED, f"ours {_ms(ours)}; " + ", ".join(f"{name} {_ms(row)}" for name, row in peers.items())
    peer = min(measured, key=lambda row: row["ms"])
    detail = f"{ours['ms']:.2f} ms, {peer['engine']} {peer['ms']:.2f} ms: {peer['ms'] / ours['ms']:.2f} times as fast"
    detail += f"; with CUDA graphs {_ms(graphs)}; published for FLUX.2 on an H200: {PUBLISHED[size]} ms"
    absent = [name for name, row in peers.items() if row is None and not (model == "flux2" and name != "sglang")]
    detail += f"; not measured: {', '.join(absent)}" if absent else ""
    return _by(peer["ms"] / ours["ms"], factor, detail)


def _against_eager(rows: list[Event]) -> tuple[str, str]:
    ours = _best(rows, 1024, "flux", lambda row: _ours(row) and row.get("limit_name") == "none")
    eager = _best(rows, 1024, "flux", lambda row: row["engine"] in ("diffusers", "diffusers channels_last"))
    if ours is None or eager is None:
        return NOT_MEASURED, f"ours {_ms(ours)}, diffusers {_ms(eager)}"
    detail = (
        f"{ours['ms']:.2f} ms, {eager['engine']} {eager['ms']:.2f} ms: {eager['ms'] / ours['ms']:.2f} times as fast"
    )
    return _by(eager["ms"] / ours["ms"], 3.0, detail)


def _within(rows: list[Event]) -> tuple[str, str]:
    row = _best(rows, 4096, "flux", lambda row: _ours(row) and row.get("limit_name") == "4 GB")
    if row is None:
        return NOT_MEASURED, _why(rows, 4096)
    return _by(row["limit"] / row["peak_bytes"], 1.0, f"{row['ms']:.0f} ms, peak {row['peak_bytes'] / 1e9:.2f} GB")


def _without(rows: list[Event]) -> tuple[str, str]:
    row = _best(rows, 4096, "flux", lambda row: _ours(row) and row.get("limit_name") == "none")
    if row is None:
        return NOT_MEASURED, _why(rows, 4096)
    return REACHED, f"{row['ms']:.0f} ms, peak {row['peak_bytes'] / 1e9:.2f} GB"


def _error(rows: list[Event]) -> tuple[str, str]:
    for_dtype = []
    for dtype, theirs_name in (("bfloat16", "diffusers"), ("float32", "diffusers without TF32")):
        ours = _last(rows, kind="decode", engine="fluxvae", model="flux", size=1024, dtype=dtype, batch=1)
        theirs = _last(rows, kind="decode", engine=theirs_name, model="flux", size=1024, dtype=dtype, batch=1)
        if ours and theirs and "rms_error" in ours and "rms_error" in theirs:
            for_dtype.append((dtype, ours["rms_error"], theirs["rms_error"]))
    if not for_dtype:
        return NOT_MEASURED, "no error of both"
    detail = "; ".join(f"{dtype}: {ours:.3e}, diffusers {theirs:.3e}" for dtype, ours, theirs in for_dtype)
    return (REACHED if all(ours <= theirs for _, ours, theirs in for_dtype) else MISSED), detail


def _whole_card(rows: list[Event]) -> tuple[str, str]:
    of = {(row["what"], row["size"]): row["above_loaded_bytes"] for row in rows if "above_loaded_bytes" in row}
    pairs = [
        (size, of["diffusers", size], of.get(("installed within a third", size)))
        for what, size in of
        if what == "diffusers"
    ]
    told = [f"{size}: {before / 1e9:.2f} GB, installed {after / 1e9:.2f} GB" for size, before, after in pairs if after]
    if not told:
        return NOT_MEASURED, "no pipeline"
    return (REACHED if all(after < before for _, before, after in pairs if after) else MISSED), "; ".join(told)


def _kernels(rows: list[Event]) -> tuple[str, str]:
    found = [row for row in rows if row.get("kind") == "kernel"]
    if not found:
        return NOT_MEASURED, "no profile"
    told = [f"{row['ms']:.2f} ms {row['name'][:40]} ({row['bound']}, {row['share_of_bound']:.0%})" for row in found]
    return REACHED, "; ".join(told)


# -- rows ----------------------------------------------------------------------------------------------------------


def _ours(row: Event) -> bool:
    """One of our decodes whose bits must be those of all others of its size: not with blocks of another size."""
    return row.get("engine") in ("fluxvae", "fluxvae graphs") and "failed" not in row and "block_values" not in row


def _best(rows: list[Event], size: int, model: str, wanted: Callable[[Event], bool]) -> Event | None:
    """The fastest decode in bfloat16 of one image."""
    fixed = {"kind": "decode", "size": size, "model": model, "batch": 1, "dtype": "bfloat16"}
    of = [row for row in rows if fixed.items() <= row.items() and "ms" in row and "failed" not in row and wanted(row)]
    return min(of, key=lambda row: row["ms"], default=None)


def _last(rows: list[Event], **fields: Any) -> Event | None:
    of = [row for row in rows if fields.items() <= {key: row.get(key) for key in fields}.items()]
    return of[-1] if of else None


def _why(rows: list[Event], size: int) -> str:
    return "; ".join(row["failed"] for row in rows if row.get("size") == size and "failed" in row) or "it was skipped"


def _ms(row: Event | None) -> str:
    return "not measured" if row is None else f"{row['ms']:.2f} ms"


def _by(ratio: float, wanted: float, detail: str) -> tuple[str, str]:
    return (REACHED, detail) if ratio >= wanted else (MISSED, f"{detail}; short by {wanted / ratio - 1:.0%}")
