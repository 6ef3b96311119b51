"""Measures typical decodes with the full FLUX architecture and seeded weights: time, peak memory and identity.

    uv run benchmarks/scenarios.py                       # all; 2048x2048 takes minutes on two cores
    uv run benchmarks/scenarios.py --only single limit
    uv run benchmarks/scenarios.py --device cuda --dtype bfloat16

Each scenario runs in a process of its own, so that its peak memory is its own. Then diffusers decodes the same latents
and the two images are compared: the reference engine must give the same bits, and the exact engine must be within its
stated tolerance. Exits 1 where a check fails. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fluxvae import Decoder
from fluxvae.pictures import postprocess
from fluxvae.verify.oracle import flux_pipeline_tail_raw, level_difference
from fluxvae.verify.tolerances import EXACT_VS_REFERENCE_CHANGED_FULL, EXACT_VS_REFERENCE_LEVELS
from measure import flux_vae, machine, measure, packed_latents


class Scenario(NamedTuple):
    """One decode, which makes one line of the table."""

    what: str
    height: int
    width: int
    batch: int
    options: dict[str, Any]


REFERENCE = {"engine": "diffusers"}
SCENARIOS = {
    "single": Scenario("one image", 1024, 1024, 1, REFERENCE),
    "batch": Scenario("a batch of four", 512, 512, 4, REFERENCE),
    "small": Scenario("512 pixels", 512, 512, 1, REFERENCE),
    "large": Scenario("2048 pixels", 2048, 2048, 1, REFERENCE),
    "limit": Scenario("memory limit 1 GB", 1024, 1024, 1, {"engine": "exact", "memory_limit": "1GB"}),
}


def run_one(name: str, device: str, dtype: str) -> dict[str, Any]:
    """Decode, measure the decode, compare the image with diffusers' and return a row of the table."""
    scenario = SCENARIOS[name]
    size = {"height": scenario.height, "width": scenario.width}
    vae = flux_vae(getattr(torch, dtype), device)
    decoder = Decoder(vae, **scenario.options)
    # A first tiny decode allocates what is allocated only once, so that it is not counted to the measured decode.
    decoder.decode_raw(packed_latents(64, 64), height=64, width=64)
    packed = packed_latents(scenario.height, scenario.width, scenario.batch)
    ours = measure(lambda: decoder.decode_raw(packed, **size), device)
    oracle = flux_pipeline_tail_raw(vae, packed.to(decoder.device, decoder.dtype), **size)
    levels = level_difference(postprocess(ours.result, "uint8"), postprocess(oracle, "uint8"))
    if scenario.options["engine"] == "diffusers":
        passed = torch.equal(ours.result, oracle)
        found = "the same bits" if passed else f"not the same bits: {levels}"
    else:
        passed = levels.largest <= EXACT_VS_REFERENCE_LEVELS[dtype].bound
        passed = passed and (dtype != "float32" or levels.changed <= EXACT_VS_REFERENCE_CHANGED_FULL.bound)
        found = str(levels)
    return {
        "scenario": name,
        "what": scenario.what,
        "size": f"{scenario.height}x{scenario.width}",
        "batch": scenario.batch,
        **scenario.options,
        "seconds": round(ours.seconds, 2),
        "peak_bytes": ours.peak_bytes,
        "changed": levels.changed,
        "passed": passed,
        "found": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="the scenarios to run (default: all)"
    )
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="the precision of the weights (default: %(default)s)",
    )
    parser.add_argument("--child", choices=SCENARIOS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_one(args.child, args.device, args.dtype)))
        return 0
    rows = []
    for name in args.only:
        print(f"{SCENARIOS[name].what} ...", file=sys.stderr, flush=True)
        child = [sys.executable, __file__, "--child", name, "--device", args.device, "--dtype", args.dtype]
        rows.append(
            json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        )
    table = Table("scenario", "size", "batch", "engine", "seconds", "peak above the model", "against diffusers")
    for row in rows:
        found = f"[green]{row['found']}[/green]" if row["passed"] else f"[red]FAIL {row['found']}[/red]"
        peak = f"{row['peak_bytes'] / 1e9:.2f} GB"
        table.add_row(row["what"], row["size"], str(row["batch"]), row["engine"], f"{row['seconds']:.1f}", peak, found)
    Console(width=120).print(table)
    result = {"benchmark": "scenarios", "device": args.device, "dtype": args.dtype, **machine(), "rows": rows}
    print(json.dumps(result))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
