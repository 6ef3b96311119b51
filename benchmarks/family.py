"""Time and peak memory of FLUX.2's decoder and its small one, full widths, seeded weights: exact against diffusers.

    uv run --group bench benchmarks/family.py --sizes 512 1024

Every case runs in a process of its own, once after a decode of 64 pixels that compiles and allocates what is done once.
The exact image is checked against diffusers' of the same size: at most one level, in at most 2 bytes of a hundred
(nearly all of that is diffusers' own error, docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from rich.console import Console
from rich.table import Table

from fluxvae import Decoder
from fluxvae.oracle import level_difference
from measure import machine, measure

WIDTHS = {"FLUX.2": None, "FLUX.2-small-decoder": (96, 192, 384, 384)}
ENGINES = {"diffusers": "diffusers", "exact, Winograd": "exact"}


def run_case(model: str, engine: str, size: int, threads: int, keep: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(decoder_block_out_channels=WIDTHS[model])
    vae.encoder = None
    with torch.no_grad():
        vae.bn.running_mean.normal_(0, 0.5)
        vae.bn.running_var.uniform_(0.5, 2.0)
    vae = vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    decoder = Decoder(vae, engine=ENGINES[engine])
    decoder.decode_raw(torch.randn(1, 16, 128), height=64, width=64)
    tokens = torch.randn(1, (size // 16) ** 2, 128, generator=torch.Generator().manual_seed(1))
    found = measure(lambda: decoder.decode_raw(tokens, height=size, width=size))
    np.save(keep, ((found.result / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    predicted = decoder.plan(size, size).peak_bytes if engine != "diffusers" else None
    return {
        "model": model, "engine": engine, "size": size, "seconds": round(found.seconds, 2),
        "peak_bytes": found.peak_bytes - found.file_bytes, "predicted_bytes": predicted,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--models", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, engine, size, keep = options.child
        print(json.dumps(run_case(model, engine, int(size), options.threads, Path(keep))))
        return 0
    rows: list[dict[str, Any]] = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            for model in options.models:
                images = []
                for engine in ENGINES:
                    keep = Path(folder) / f"{size}.npy"
                    call = [sys.executable, __file__, "--threads", str(options.threads)]
                    call += ["--child", model, engine, str(size), str(keep)]
                    done = subprocess.run(call, capture_output=True, text=True, check=True)
                    rows.append(json.loads(done.stdout.splitlines()[-1]))
                    images.append(np.load(keep))
                difference = level_difference(images[1], images[0])
                rows[-1] |= {"levels": difference.largest, "changed": difference.changed}
                failed |= difference.largest > 1 or difference.changed > 0.02
    columns = ("model", "pixels", "engine", "seconds", "peak GB", "predicted GB", "bytes changed")
    table = Table(*columns, title=str(machine()["cpu"]))
    for row in rows:
        predicted = row["predicted_bytes"]
        table.add_row(
            row["model"], str(row["size"]), row["engine"], str(row["seconds"]), f"{row['peak_bytes'] / 1e9:.2f}",
            "" if predicted is None else f"{predicted / 1e9:.2f}", f"{row['changed']:.4%}" if "changed" in row else "",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"benchmark": "family", "machine": machine(), "rows": rows}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
