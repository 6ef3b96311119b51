"""Runs the cases of one benchmark in processes of their own, which take turns, and collects their rows.

`memory.py` and `encode.py` measure the same cases, one for each direction: diffusers untiled and tiled, and the exact
engine with its kernels and limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measure import MODELS

__all__ = ["EXACT", "TILE", "TILED", "UNTILED", "Case", "add_options", "cases_of", "child", "compare_limits", "in_turn"]

UNTILED, TILED, EXACT = "diffusers", "diffusers tiled", "exact"
DEFAULT_LIMITS = {512: ["none", "0.25GB"], 1024: ["none", "0.7GB"], 2048: ["1GB"], 4096: ["2GB"]}
TILE = 512
"""The size of diffusers' tiles here, in pixels. For FLUX it is 1024 by default, which leaves an image of 1024x1024
untiled."""

Case = tuple[str, str]
"""What computes, such as ``"exact winograd"``, and its limit; ``""`` for diffusers."""


def add_options(parser: argparse.ArgumentParser, *, thing: str, sizes: list[int]) -> None:
    """Add the options that both benchmarks have. ``thing`` is what is measured: a decode or an encode."""
    add = parser.add_argument
    add("--sizes", type=int, nargs="*", default=sizes, help=f"pixels each way (default: {' '.join(map(str, sizes))})")
    add("--limits", nargs="+", help="limits of the exact engine: 'none', or sizes such as 0.7GB (default: by size)")
    add("--only", nargs="+", choices=[UNTILED, TILED, EXACT], help=f"which kinds of {thing} to run (default: all)")
    add(
        "--kernels", nargs="+", choices=["torch", "winograd"], default=["torch", "winograd"],
        help="which kernels the exact engine runs with (default: both)",
    )  # fmt: skip
    add(
        "--model", default="flux",
        help=f"which VAE: {', '.join(MODELS)} have full widths and seeded weights, 'demo' ships (default: flux)",
    )  # fmt: skip
    add(
        "--threads", type=int, default=torch.get_num_threads(),
        help=f"how many threads the {thing} computes with (default: PyTorch's choice, %(default)s)",
    )  # fmt: skip
    add("--repeats", type=int, default=2, help="rounds; the cases take turns in each (default: %(default)s)")
    add("--child", nargs=4, help=argparse.SUPPRESS)


def cases_of(size: int, options: argparse.Namespace) -> list[Case]:
    """Return what is to be run at one size, diffusers untiled first."""
    limits = options.limits or DEFAULT_LIMITS.get(size, ["none"])
    cases = [(UNTILED, ""), (TILED, ""), *((f"{EXACT} {name}", limit) for name in options.kernels for limit in limits)]
    return [case for case in cases if not options.only or (EXACT if EXACT in case[0] else case[0]) in options.only]


def child(script: str, case: Case, size: int, options: argparse.Namespace, keep: Path) -> dict[str, Any]:
    """Let ``script`` run one case in a new process, and return its row, or a row that says how it failed."""
    call = [sys.executable, script, "--child", *case, str(size), str(keep)]
    call += ["--model", options.model, "--threads", str(options.threads)]
    call += ["--dtype", options.dtype] if hasattr(options, "dtype") else []
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def in_turn(
    script: str, cases: list[Case], size: int, options: argparse.Namespace, folder: Path
) -> tuple[dict[Case, dict[str, Any]], dict[Case, np.ndarray]]:
    """Run all cases of one size in turn, as many rounds as are asked for; return their rows and their results."""
    rows: dict[Case, dict[str, Any]] = {}
    kept = {case: folder / f"{size}-{number}.npy" for number, case in enumerate(cases)}
    for turn in range(options.repeats):
        for case in cases:
            kind, limit = case
            row = child(script, case, size, options, kept[case])
            print(f"{size} {kind} {limit} round {turn + 1}: {row}", file=sys.stderr, flush=True)
            best = rows.setdefault(case, {"size": size, "case": kind, "limit": limit, "rounds": []} | row)
            if "failed" not in row and "failed" not in best:
                best["rounds"].append(round(row["seconds"], 2))
                best["seconds"] = statistics.median(best["rounds"])
                best["peak"] = max(best["peak"], row["peak"])
    results = {}
    for case, path in kept.items():
        if path.exists():
            results[case] = np.load(path)
            path.unlink()
    return rows, results


def compare_limits(rows: dict[Case, dict[str, Any]], results: dict[Case, np.ndarray]) -> None:
    """Say in the rows of the exact engine whether their results are those of its first limit."""
    first: dict[str, np.ndarray] = {}
    for case, result in results.items():
        if case[0].startswith(EXACT):
            if case[0] in first:
                rows[case]["same_bits"] = bool(np.array_equal(result, first[case[0]]))
            first.setdefault(case[0], result)
