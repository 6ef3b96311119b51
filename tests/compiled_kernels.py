"""The kernels that decodes and encodes launch, as machine code for cards that are not here, and what it takes of them.

The kernels are those that the engine itself asked for on a described card (`fake_card`), so none is written down here.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.backends.nvidia
from triton import knobs

from fake_card import MODELS, Card, Wanted, fake_vae, faked_card
from fluxvae.engine.exact import ExactDecoder, ExactEncoder

__all__ = ["Resources", "resources", "wanted"]

_LATENTS = 8


class Resources(NamedTuple):
    """What one kernel takes of a card."""

    card: Card
    kernel: str
    shared: int
    """Bytes of shared memory of a program, with those that the card keeps for itself where the code counts them."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that are in memory because there are too few registers: stored or loaded, the larger."""
    tensor_memory: int
    """Columns of data-centre Blackwell's tensor memory, of 512."""
    instructions: tuple[str, ...]
    """Which of those that matter for speed it has."""
    seconds: float
    """What compiling took."""


_TELLING = ("wgmma", "tcgen05", "mma.sync", "cp.async", "ld.global.v4", "st.global.v4", "rn.f64")


def wanted(capability: int, dtypes: Iterable[torch.dtype], models: Iterable[str] = MODELS) -> list[Wanted]:
    """Every kernel that a decode and an encode launch on such a card.

    A small image does, which a test checks: a kernel is specialised by the widths of layers and by the alignment of
    what it is given, and the language is told not to specialise by numbers that grow with an image.
    """
    with faked_card(capability) as launches:
        for dtype in dtypes:
            for model in models:
                vae, side = fake_vae(dtype, model), _LATENTS
                decoder, encoder = ExactDecoder(vae), ExactEncoder(vae)
                decoder.decode(torch.empty(1, decoder.network.in_channels, side, side, dtype=dtype, device="cuda"))
                encoder.encode(torch.empty(1, 3, 8 * side, 8 * side, dtype=dtype, device="cuda"))
    return launches.wanted


def resources(kernel: Wanted) -> Resources:
    """Compile the kernel for its card by the language's compiler and ptxas, and read its resources from the result."""
    start = time.perf_counter()
    made, spilled = _compiled(kernel)
    seconds = time.perf_counter() - start
    usage = _usage(made.asm["cubin"])
    return Resources(
        card=kernel.card,
        kernel=kernel.label,
        shared=made.metadata.shared + usage["SHARED"],
        registers=usage["REG"],
        spilled=spilled,
        tensor_memory=getattr(made.metadata, "tmem_size", 0) or 0,
        instructions=tuple(name for name in _TELLING if name in made.asm["ptx"]),
        seconds=seconds,
    )


def _compiled(kernel: Wanted) -> tuple[Any, int]:
    """The compiled kernel, and the bytes that ptxas says it spills; its stack may be for something else too."""
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        made = kernel.compiled()
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert found, log.getvalue()
    return made, max(map(int, found.groups()))


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack, static shared and local memory, as the tool that comes with the language prints them."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", told)
    assert found, told
    return dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, found.groups()), strict=True))
