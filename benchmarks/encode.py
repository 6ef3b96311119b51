"""Measures memory, time and error of encoding: diffusers untiled and tiled, and the exact engine at several limits.

    uv run --group bench benchmarks/encode.py                                  # FLUX's widths, 512 and 1024
    uv run --group bench benchmarks/encode.py --sizes 1024 --limits none 0.7GB
    uv run --group bench benchmarks/encode.py --sizes 4096 --only exact --kernels winograd --limits 2GB --repeats 1
    uv run --group bench benchmarks/encode.py --model demo                     # a trained network: what tiles do to it

Every case runs in a process of its own, so that its peak above the loaded model (and above the pixels that it is given)
is its own. The cases of one size take turns (``--repeats`` rounds), so that a slow minute of the machine hits all
alike; the time is the median of the rounds, given with its spread. The picture is a photograph, enlarged where it is
smaller than what is measured.

Results are checked against diffusers' untiled encode in the same dtype, where that was run: how far the mean of the
latents is off, as a share of the latents' own size (rms). With ``--truth`` (sizes up to 512, or patience) the oracle is
diffusers in float64, and the table has how many times as far from it each case is as diffusers. Exits 1 where latents
depend on the limit, or are further from diffusers' than Winograd's rounding can take them. The last line is JSON.
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
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data

from cases import EXACT, TILE, TILED, UNTILED, add_options, cases_of, child, compare_limits, in_turn
from fluxvae.checkpoints import load_vae
from fluxvae.engine.exact import ExactEncoder
from fluxvae.engine.plan import parse_memory_limit
from fluxvae.engine.way import ENCODE
from fluxvae.pixels import check_images, to_pixels
from measure import MODELS, diffusers_encode, full_vae, machine, measure, set_tiles

MOST_APART = 5e-3
"""The largest rms difference between an exact mean and diffusers', as a share of the latents' size. With trained
weights rounding makes about 1e-6. With random ones, whose latents of a smooth picture are small sums of large terms,
diffusers' own rounding makes 7e-4. Tiles make 0.1 and more."""


def picture(size: int, dtype: torch.dtype) -> torch.Tensor:
    """A photograph of size x size pixels as what a VAE encodes, (1, 3, size, size)."""
    image = Image.fromarray(data.retina())
    side = min(image.size)
    image = image.crop((0, 0, side, side)).resize((size, size), Image.Resampling.LANCZOS)
    return to_pixels(check_images(image, 8, 3), dtype, torch.device("cpu"))


def run_case(kind: str, limit: str, size: int, options: argparse.Namespace, keep: Path) -> dict[str, Any]:
    """Measure one encode in this process, and save its mean as ``keep``."""
    torch.set_num_threads(options.threads)
    dtype, row = getattr(torch, options.dtype), {}
    vae = full_vae(options.model, way=ENCODE) if options.model in MODELS else load_vae(options.model, way=ENCODE)
    if kind == "truth":
        dtype = torch.float64
    vae = torch.nn.Module.to(vae, dtype)
    pixels = picture(size, dtype)
    small = pixels[:, :, :64, :64].contiguous()
    with torch.inference_mode():
        if kind.startswith(EXACT):
            kernels = kind.split()[1]
            allowed = None if limit == "none" else parse_memory_limit(limit)
            ExactEncoder(vae, kernels=kernels).prepare()
            engine = ExactEncoder(vae, kernels=kernels, memory_limit=allowed)
            plan = engine.plan(size, size)
            row = {
                "predicted": plan.peak_bytes - pixels.nbytes,  # which are here before the measuring begins
                "work_ratio": plan.work_ratio,
                "spill": plan.spill_bytes,
            }
            run = measure(lambda: engine.encode(pixels))
            moments = run.result
        else:
            diffusers_encode(vae, small)
            if kind == TILED:
                set_tiles(vae, TILE)
            run = measure(lambda: diffusers_encode(vae, pixels))
            moments = run.result
    np.save(keep, moments.chunk(2, 1)[0].double().numpy())
    return row | {"seconds": run.seconds, "peak": run.peak_bytes, "file_pages": run.file_bytes}


def run_size(size: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure all cases of one size, and compare their latents."""
    rows, means = in_turn(__file__, cases_of(size, options), size, options, folder)
    reference, truth = means.get((UNTILED, "")), None
    if options.truth:
        keep = folder / "truth.npy"
        child(__file__, ("truth", ""), size, options, keep)
        truth = np.load(keep)
    for case, mean in means.items():
        row = rows[case]
        if reference is not None and case[0] != UNTILED:
            row["apart"] = rms(mean - reference) / rms(reference)
        if reference is not None and truth is not None:
            row["error_ratio"] = rms(mean - truth) / rms(reference - truth)
        if "seconds" in row and (UNTILED, "") in rows and "seconds" in rows[UNTILED, ""]:
            row["times"] = row["seconds"] / rows[UNTILED, ""]["seconds"]
    compare_limits(rows, means)
    return list(rows.values())


def rms(values: np.ndarray) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.square(values).mean()))


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    """Show the rows as a table for the terminal."""
    name = MODELS.get(options.model, options.model).replace("decoder", "encoder")
    shown = Table(title=f"{name}, {options.dtype}; peak above model and pixels; latents against diffusers untiled")
    columns = ("size", "encode", "limit", "time", "spread", "of diffusers", "peak", "predicted", "work", "apart")
    for column in (*columns, *(["error"] if options.truth else []), "same bits"):
        shown.add_column(column, justify="left" if column == "encode" else "right")
    for row in rows:
        if "failed" in row:
            shown.add_row(str(row["size"]), row["case"], row["limit"], row["failed"])
            continue
        cells = [
            f"{row['seconds']:.1f} s",
            f"{min(row['rounds']):.1f} to {max(row['rounds']):.1f}",
            f"{row['times']:.2f}" if "times" in row else "",
            f"{row['peak'] / 1e9:.3f} GB",
            f"{row['predicted'] / 1e9:.3f} GB" if "predicted" in row else "",
            f"x{row['work_ratio']:.2f}" if "work_ratio" in row else "",
            f"{row['apart']:.1e}" if "apart" in row else "",
            *([f"x{row['error_ratio']:.2f}" if "error_ratio" in row else ""] if options.truth else []),
            {True: "yes", False: "[red]NO[/red]", None: ""}[row.get("same_bits")],
        ]
        shown.add_row(str(row["size"]), row["case"], row["limit"], *cells)
    return shown


def main() -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, thing="encode", sizes=[512, 1024])
    add = parser.add_argument
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (default: float32)")
    add("--truth", action="store_true", help="compare with diffusers in float64 too, which takes several times as long")
    options = parser.parse_args()
    if options.child:
        kind, limit, size, keep = options.child
        print(json.dumps(run_case(kind, limit, int(size), options, Path(keep))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for size in options.sizes for row in run_size(size, options, Path(folder))]
    Console(width=140).print(table(rows, options))
    wrong = [
        row
        for row in rows
        if row.get("same_bits") is False
        or "failed" in row
        or (row["case"].startswith(EXACT) and options.dtype == "float32" and row.get("apart", 0) > MOST_APART)
    ]
    print(json.dumps({"benchmark": "encode", "model": options.model, "machine": machine(), "rows": rows}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
