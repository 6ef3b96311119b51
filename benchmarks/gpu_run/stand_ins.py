"""What a rehearsal has in the place of NVIDIA's programs and of SGLang's files. Imports no PyTorch."""

from __future__ import annotations

from pathlib import Path

from gpu_run.sglang_files import FILES

__all__ = ["commands", "without_sglang"]


def without_sglang(folder: Path) -> None:
    """Write a stand-in for SGLang's four files where a rehearsal has none: the same names, and diffusers' result."""
    bodies = {
        "flux2_vae_cuda_opt": _STAND_IN,
        "fast_path_gate": "from contextlib import nullcontext\nuse_vae_fast_path = lambda vae, on: nullcontext()\n",
        "group_norm_silu_twopass_triton": "__all__ = ['nothing']\nnothing = None\n",
    }
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(bodies.get(path.stem, ""))


_STAND_IN = """
import torch
from sglang.kernels.ops.diffusion import nothing
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

class FusedGroupNormSiLU(torch.nn.Identity): ...
class FusedUpsample2xConv2d(torch.nn.Identity): ...

def _install_decoder_fast_paths(vae, label):
    init_logger(__name__).info(label)
    vae.decoder.fused = torch.nn.ModuleList([FusedGroupNormSiLU(), FusedUpsample2xConv2d()])
"""


def commands(folder: Path) -> None:
    """Write stand-ins for the two programs of NVIDIA's that a part starts."""
    programs = {
        "nvidia-smi": "echo 'no card (rehearsed)'",
        "compute-sanitizer": 'log=$4; shift 4; "$@"; code=$?; echo "ERROR SUMMARY: 0 errors" > "$log"; exit $code',
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in programs.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
