"""Plans a decode without reading the checkpoint's weights: `plan_decode`, whose result ``fluxvae plan`` shows.

On a CPU a plan follows from the checkpoint's headers, the size and the machine, and is made without importing PyTorch
or diffusers, which takes seconds. Everything else is planned by a decoder that has zeros for weights. That is so on a
GPU, of which only PyTorch knows what it is and what is free; for previews; and for half precision with PyTorch's
kernels, where oneDNN is asked which dtype it computes in.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxvae.checkpoints import open_checkpoint
from fluxvae.checkpoints.load import Checkpoint
from fluxvae.engine.calls import Costs
from fluxvae.engine.network import Network
from fluxvae.engine.plan import Plan, check_size, parse_memory_limit

__all__ = ["Planned", "plan_decode"]

_ITEMSIZES = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
"""The device files by which a GPU is found without PyTorch: those of NVIDIA's driver, of Windows' driver for WSL, and
of AMD's driver, whose GPUs PyTorch calls cuda too."""


@dataclass(frozen=True)
class Planned:
    """A plan, and the decode that it is for."""

    plan: Plan
    smallest_limit: int
    """The smallest ``memory_limit``, in bytes, with which this size can be decoded."""
    device: str
    dtype: str
    approximate: bool
    """Whether the checkpoint is a preview, whose images are approximate."""
    assumed: str
    """A sentence on what was assumed about the checkpoint; empty where nothing was assumed."""


def plan_decode(
    source: str | Path,
    height: int,
    width: int,
    batch: int = 1,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    memory_limit: str | int | None = None,
    **options: Any,
) -> Planned:
    """Plan how ``batch`` images of this size would be decoded with this checkpoint on this machine now.

    Args:
        source: the checkpoint, as for `open_checkpoint`.
        height, width: the size of the images in pixels, multiples of what one latent stands for.
        batch: how many images are decoded together.
        device, dtype, kernels, memory_limit: as for `Decoder.from_pretrained`.
        options: further options of `open_checkpoint`, such as family and variant.

    Raises:
        CheckpointError, InvalidLatentsError, InvalidOptionError, MemoryLimitError: where the decode would raise them.
    """
    checkpoint = open_checkpoint(source, **options)
    checkpoint.warn()
    network = checkpoint.network
    costs = _costs(kernels, dtype) if network is not None and _on_cpu(device) and dtype in _ITEMSIZES else None
    if network is None or costs is None:
        return _by_decoder(checkpoint, height, width, batch, device, dtype, kernels, memory_limit)
    check_size(height, width, batch, network.scale)
    limit = None if memory_limit is None else parse_memory_limit(memory_limit)
    plan, smallest = _by_headers(network, costs, height, width, batch, _ITEMSIZES[dtype], limit)
    notes = "; ".join(note for note in (plan.kernels_note, checkpoint.assumed) if note)
    plan = dataclasses.replace(plan, kernels_note=notes)
    stored = "float32" if dtype == "auto" else dtype
    return Planned(plan, smallest, "cpu", stored, False, checkpoint.assumed)


def _on_cpu(device: str) -> bool:
    """Return whether PyTorch would decode on the CPU, as far as that can be told without importing it."""
    if device == "auto" and sys.platform == "linux":
        return not any(map(os.path.exists, _GPU_FILES))
    return device == "cpu"


def _costs(kernels: str, dtype: str) -> Costs | None:
    """Return the costs of the kernels that would be used on a CPU.

    Returns:
        None where a decoder must be asked: for kernels that are unknown or do not run here, which it refuses, and for
        PyTorch's kernels with half precision, where oneDNN decides which dtype it computes in.
    """
    from fluxvae.engine.kernels.choose import instead_of, no_winograd
    from fluxvae.engine.kernels.cpu.costs import WinogradCosts
    from fluxvae.engine.kernels.direct.costs import DirectCosts

    reason = no_winograd("cpu")
    if kernels in ("auto", "winograd") and reason is None:
        return WinogradCosts("cpu")
    if kernels not in ("auto", "torch") or _ITEMSIZES[dtype] != 4:
        return None
    return DirectCosts("cpu", instead=instead_of("winograd", reason) if kernels == "auto" and reason else "")


def _by_headers(
    network: Network, costs: Costs, height: int, width: int, batch: int, stored: int, limit: int | None
) -> tuple[Plan, int]:
    from fluxvae.engine import torch_library
    from fluxvae.engine.memory.free import available_memory, free_disk, spill_folder
    from fluxvae.engine.planner import limit_of, make_planner

    planner = make_planner(
        network, costs, (height // network.scale, width // network.scale), batch=batch,
        computed=4, stored=stored, cast=stored != 4, on_cpu=True, threads=torch_library.threads(),
    )  # fmt: skip
    folder = spill_folder(None)
    allowed, told_by = limit_of(limit, lambda: available_memory("cpu"))
    plan = planner.plan(allowed, source=told_by, spill_free=free_disk(folder), spill_dir=str(folder))
    return plan, planner.smallest_limit(free_disk(folder))


def _by_decoder(
    checkpoint: Checkpoint, height: int, width: int, batch: int, device: str, dtype: str, kernels: str,
    memory_limit: str | int | None,
) -> Planned:  # fmt: skip
    from fluxvae.decoder import Decoder
    from fluxvae.forked import refuse_to_hang
    from fluxvae.options import resolve_device, resolve_dtype

    refuse_to_hang()
    where = resolve_device(device)
    decoder = Decoder(checkpoint.empty(resolve_dtype(dtype, where), where), kernels=kernels, memory_limit=memory_limit)
    decoder.assumed = checkpoint.assumed
    plan = decoder.plan(height, width, batch)
    scale = decoder.format.vae_scale_factor
    smallest = decoder.engine.smallest_limit(height // scale, width // scale, batch)  # type: ignore[union-attr]
    stored = str(decoder.dtype).removeprefix("torch.")
    return Planned(plan, smallest, str(decoder.device), stored, decoder.approximate, checkpoint.assumed)
