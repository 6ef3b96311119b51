"""For compute-sanitizer: the kernels' self-test, and decodes with and without spilling, small.

compute-sanitizer --tool memcheck python benchmarks/gpu_run/memcheck.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]
    from gpu_run import lines

    if lines.VARIABLE in os.environ:
        lines.watch()
    from gpu_run.memcheck import main  # this very file, as a module that is watched

    main("--rehearse" in sys.argv)
    sys.exit()

import torch

from fluxvae.engine.exact import ExactDecoder
from gpu_run.networks import small_vae

__all__ = ["main"]

CASES = (((128, 256, 512, 512), 7, 9), ((96, 192, 384, 384), 5, 8))
"""Widths of the levels, FLUX's and those of FLUX.2's small decoder, and the height and width of the latents."""


def main(rehearsed: bool) -> None:
    device = torch.device("cuda")
    cases, block = CASES, 1 << 16
    if rehearsed:
        from gpu_run import rehearsal

        rehearsal.fake_card()
        device, cases, block = rehearsal.CPU, (((8, 8, 8, 8), 2, 3),), 1 << 12
    for widths, height, width in cases:
        for dtype in (torch.bfloat16, torch.float32):
            vae = small_vae(widths, dtype, groups=4 if rehearsed else 32)
            vae = torch.nn.Module.to(vae, device, memory_format=torch.channels_last)
            raw = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            free = ExactDecoder(vae, kernels="cuda", block_values=block)
            free.prepare()
            image = free.decode(raw)
            tight = ExactDecoder(
                vae, kernels="cuda", block_values=block, memory_limit=free.smallest_limit(height, width)
            )
            plan = tight.plan(height, width)
            print(widths, dtype, f"same bits: {torch.equal(tight.decode(raw), image)}", plan.rungs, flush=True)
            print(plan.kernels, plan.kernels_note or "(no note)", flush=True)
