"""SGLang's decoder path for FLUX.2 and FLUX.1, from four files of its wheel and without its server.

Facts, from sglang 0.5.23 (`benchmarks/on_a_card.sh fetch` puts the files into a folder): the path changes a diffusers
``Decoder`` in place, whichever VAE holds it, so diffusers' own models serve. It makes the decoder channels last,
replaces GroupNorm and SiLU by three Triton kernels over whole maps, an upsample and its convolution by one transposed
convolution, and folds attention's last two projections. It computes only while a gate is open, which SGLang opens for
requests of quality ``"lossless"`` or ``"high"``. It needs PyTorch, Triton and diffusers, neither sgl-kernel nor a
compiler. Importing `sglang` itself would start with its server's packages, so the packages on the way to the four files
are empty ones, and two names are put where they are looked for.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gpu_run.sglang_files import FILES, GATE, KERNELS, OPERATIONS, OPTIMIZATIONS

__all__ = ["FILES", "FastPath", "load", "version"]

_LOGGING = "sglang.multimodal_gen.runtime.utils.logging_utils"


class FastPath:
    """SGLang's path, loaded."""

    def __init__(self, optimizations: Any, gate: Any, kernels: Any) -> None:
        self._optimizations, self._gate, self.kernels = optimizations, gate, kernels

    def install(self, vae: Any) -> dict[str, int]:
        """Change the decoder of a diffusers VAE, and count what was changed.

        Raises:
            RuntimeError: it was left as it was.
        """
        self._optimizations._install_decoder_fast_paths(vae, "benchmark")
        kinds = [type(module).__name__ for module in vae.decoder.modules()]
        counts = {name: kinds.count(name) for name in ("FusedGroupNormSiLU", "FusedUpsample2xConv2d")}
        if not all(counts.values()):
            raise RuntimeError(f"sglang: got a decoder that it did not change ({counts}); expected FLUX's")
        return counts

    def decode(self, vae: Any, raw: torch.Tensor) -> torch.Tensor:
        """Decode with the gate open."""
        with self._gate.use_vae_fast_path(vae, True):
            image: torch.Tensor = vae.decode(raw, return_dict=False)[0]
        return image


def load(folder: Path) -> FastPath:
    """Import the four files from ``folder``.

    Raises:
        FileNotFoundError: a file is missing.
    """
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"sglang: got no {missing[0]} in {folder}; expected it there; run `benchmarks/on_a_card.sh fetch`"
        )
    names = [name.removesuffix(".py").replace("/", ".") for name in FILES] + [_LOGGING]
    for name in names:
        for package in _packages(name):
            _empty(package, folder)
    quiet = ModuleType(_LOGGING)
    quiet.init_logger = logging.getLogger  # type: ignore[attr-defined]
    sys.modules.setdefault(_LOGGING, quiet)
    kernels = importlib.import_module(KERNELS)
    for name in kernels.__all__:
        setattr(sys.modules[OPERATIONS], name, getattr(kernels, name))
    optimizations = importlib.import_module(OPTIMIZATIONS)
    return FastPath(optimizations, importlib.import_module(GATE), kernels)


def version(folder: Path) -> str:
    """The version of the wheel that the files are from."""
    noted = folder / "VERSION"
    return noted.read_text().strip() if noted.exists() else "unknown"


def _packages(name: str) -> list[str]:
    steps = name.split(".")[:-1]
    return [".".join(steps[: count + 1]) for count in range(len(steps))]


def _empty(name: str, folder: Path) -> None:
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
