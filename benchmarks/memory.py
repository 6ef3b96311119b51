"""Measures memory, time and error of decoding: diffusers untiled and tiled, and the exact engine at several limits.

    uv run --group bench benchmarks/memory.py                                   # 512, 1024 and 2048
    uv run --group bench benchmarks/memory.py --sizes 512 --limits 0.35GB none
    uv run --group bench benchmarks/memory.py --sizes 4096 --only exact --kernels winograd --repeats 1
    uv run --group bench benchmarks/memory.py --sizes 4096 --only exact --model demo --limits 1GB --repeats 1
    uv run --group bench benchmarks/memory.py --sizes 1024 --model flux2 --only diffusers exact   # or flux2-small

Every case runs in a process of its own, so that its peak above the loaded model is its own, and a case that is killed
for lack of memory becomes a row that says so. The cases of one size take turns (``--repeats`` rounds), so that a slow
minute of the machine hits all alike; the time is the median of the rounds, given with its spread. Errors are measured
against diffusers' untiled float32 decode of the same size, where that was run: the largest and the rms difference in
[-1, 1], the share of uint8 values that differ, the mean colour shift, and (for tiles) how much steeper the difference
is across tile borders than elsewhere. Exits 1 where an exact image depends on its limit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cases import EXACT, TILE, TILED, UNTILED, add_options, cases_of, compare_limits, in_turn
from fluxvae.checkpoints import load_vae
from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.plan import parse_memory_limit
from measure import MODELS, diffusers_decode, earlier_rows, full_vae, machine, measure, raw_latents, set_tiles


def run_case(kind: str, limit: str, size: int, model: str, threads: int, keep: Path) -> dict[str, Any]:
    """Measure one decode in this process, and save its image as ``keep``."""
    torch.set_num_threads(threads)
    vae = full_vae(model) if model in MODELS else load_vae(model, dtype=torch.float32)
    raw, row = raw_latents(model, size), {}
    small = raw[:, :, :4, :4].contiguous()
    with torch.inference_mode():
        if kind.startswith(EXACT):
            kernels = kind.split()[1]
            allowed = None if limit == "none" else parse_memory_limit(limit)
            ExactDecoder(vae, kernels=kernels).decode(small)
            engine = ExactDecoder(vae, kernels=kernels, memory_limit=allowed)
            plan = engine.plan(size // 8, size // 8)
            row = {"predicted": plan.peak_bytes, "work_ratio": plan.work_ratio, "spill": plan.spill_bytes}
            run = measure(lambda: engine.decode(raw))
            image = run.result
        else:
            diffusers_decode(vae, small)
            if kind == TILED:
                set_tiles(vae, TILE)
            raw = raw.contiguous(memory_format=torch.channels_last)
            run = measure(lambda: diffusers_decode(vae, raw))
            image = run.result
    np.save(keep, image.float().numpy())
    return row | {"seconds": run.seconds, "peak": run.peak_bytes, "file_pages": run.file_bytes}


def errors(image: np.ndarray, truth: np.ndarray, tile: int | None) -> dict[str, float]:
    """Measure how far ``image`` is from ``truth``, both (1, 3, H, W); with a tile size also how much its seams show."""
    difference = image.astype(np.float64) - truth
    levels = [np.round((np.clip(x.astype(np.float64) / 2 + 0.5, 0, 1)) * 255) for x in (image, truth)]
    found = {
        "max": float(np.abs(difference).max()),
        "rms": float(np.sqrt(np.square(difference).mean())),
        "changed": float((levels[0] != levels[1]).mean()),
        "colour": float(np.abs(difference.mean(axis=(0, 2, 3))).max()),
    }
    if tile is not None and image.shape[3] > tile:
        # A tile starts after every three quarters of a tile. diffusers blends it into the one before over the quarter
        # that they share.
        steps = np.abs(np.diff(difference, axis=3)).mean(axis=(0, 1, 2))
        at = [x for start in range(tile * 3 // 4, image.shape[3], tile * 3 // 4) for x in (start - 1,)]
        found["seam"] = float(steps[at].mean() / steps.mean())
    return found


def run_size(size: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure all cases of one size, and compare their images."""
    rows, images = in_turn(__file__, cases_of(size, options), size, options, folder)
    truth = images.get((UNTILED, ""))
    for case, image in images.items():
        if truth is not None and case[0] != UNTILED:
            rows[case] |= errors(image, truth, TILE if case[0] == TILED else None)
    compare_limits(rows, images)
    return list(rows.values())


def table(rows: list[dict[str, Any]], model: str) -> Table:
    """Show the rows as a table for the terminal."""
    shown = Table(title=f"{MODELS.get(model, model)}, float32; peak above the model; errors against diffusers untiled")
    for column in (
        "size",
        "decode",
        "limit",
        "time",
        "spread",
        "peak",
        "predicted",
        "work",
        "max error",
        "uint8 changed",
        "seam",
        "same bits",
    ):
        shown.add_column(column, justify="left" if column == "decode" else "right")
    for row in rows:
        if "failed" in row:
            shown.add_row(str(row["size"]), row["case"], row["limit"], row["failed"])
            continue
        cells = [
            f"{row['seconds']:.1f} s",
            f"{min(row['rounds']):.1f} to {max(row['rounds']):.1f}",
            f"{row['peak'] / 1e9:.3f} GB",
            f"{row['predicted'] / 1e9:.3f} GB" if "predicted" in row else "",
            f"x{row['work_ratio']:.2f}" if "work_ratio" in row else "",
            f"{row['max']:.1e}" if "max" in row else "",
            f"{row['changed']:.3%}" if "changed" in row else "",
            f"x{row['seam']:.1f}" if "seam" in row else "",
            {True: "yes", False: "[red]NO[/red]", None: ""}[row.get("same_bits")],
        ]
        shown.add_row(str(row["size"]), row["case"], row["limit"], *cells)
    return shown


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the peak against the size, and the time against the peak."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (uv sync --group bench)", file=sys.stderr)
        return
    rows = [row for row in rows if "failed" not in row]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = dict.fromkeys(row["case"] for row in rows)
    for name, marker in zip(names, "os^D", strict=False):
        mine = [row for row in rows if row["case"] == name]
        style = {"marker": marker, "linestyle": "", "fillstyle": "none", "markeredgewidth": 2, "label": name}
        left.plot([r["size"] for r in mine], [r["peak"] / 1e9 for r in mine], **style)
        right.plot([r["peak"] / 1e9 for r in mine], [r["seconds"] for r in mine], **style)
        for r in mine:
            limit = f", within {r['limit']}" if r["limit"] not in ("", "none") else ""
            right.annotate(f"  {r['size']}{limit}", (r["peak"] / 1e9, r["seconds"]), fontsize=7, va="center")
    for axes, x, y in (
        (left, "pixels along each side", "peak above the model, GB"),
        (right, "peak above the model, GB", "seconds"),
    ):
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axes.xaxis.set_minor_formatter("")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    right.set_xlim(right=right.get_xlim()[1] * 2)  # leaves room for the labels
    left.set_xticks(sorted({r["size"] for r in rows}), [str(s) for s in sorted({r["size"] for r in rows})])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, thing="decode", sizes=[512, 1024, 2048])
    parser.add_argument(
        "--plot", type=Path, help="draw the results into this PNG; docs/images/memory.png is of the model flux"
    )
    parser.add_argument(
        "--earlier", nargs="+", type=Path, default=[], help="files with what earlier runs printed, to be drawn too"
    )
    options = parser.parse_args()
    if options.child:
        kind, limit, size, keep = options.child
        print(json.dumps(run_case(kind, limit, int(size), options.model, options.threads, Path(keep))))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            rows += run_size(size, options, Path(folder))
    Console(width=150).print(table(rows, options.model))
    if options.plot:
        plot(earlier_rows(options.earlier) + rows, options.plot)
    print(json.dumps({"benchmark": "memory", "machine": machine(), "model": options.model, "rows": rows}))
    return int(any(row.get("same_bits") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
