"""What the parts of one process share: networks, latents, the truth, and how a decode becomes a row."""

from __future__ import annotations

import copy
import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fluxvae.engine.exact import ExactDecoder
from gpu_run.log import Log
from gpu_run.timing import Row, peak_of, timed
from measure import full_vae

__all__ = ["Bench", "Decode", "digest"]

Decode = Callable[[torch.Tensor], torch.Tensor]
"""Raw latents (B, C, lh, lw) to an image (B, 3, 8 lh, 8 lw)."""
TRUE_UP_TO = 1024
"""Pixels each way up to which a decode is compared with one in float64: above it that takes too much memory."""


class Bench:
    """One child process of a run. ``part`` is the name of the part that runs."""

    def __init__(self, log: Log, deadline: float, out: Path, sglang: Path, rehearsed: bool) -> None:
        self.log, self.deadline, self.out, self.sglang, self.part = log, deadline, out, sglang, ""
        self.device = torch.device("cuda")
        self.tests = Path(__file__).parents[2] / "tests" / "test_gpu.py"
        self.small = rehearsed
        """Tiny networks and pictures; on a CPU, as `rehearsal` says."""
        self._vaes: dict[tuple[str, str], Any] = {}
        self._truth: dict[tuple[str, int, str], torch.Tensor] = {}
        if rehearsed:
            from gpu_run import rehearsal

            rehearsal.prepare(self)

    @contextmanager
    def session(self) -> Iterator[None]:
        """What a part runs within: no gradients are recorded."""
        with torch.no_grad():
            yield

    def clean(self) -> None:
        """Give back what a part has left behind.

        Raises:
            RuntimeError: the CUDA context is lost.
        """
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    # -- what is written ---------------------------------------------------------------------------------------

    def row(self, **fields: Any) -> None:
        """Write a row, as soon as it is measured."""
        self.log.write("row", self.part, **fields)

    def must(self, holds: bool, what: str) -> None:
        """Write that something is not as it must be, unless it is."""
        _ = holds or self.log.write("wrong", self.part, what=what)

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, write that ``what`` was skipped."""
        left = self.deadline - time.monotonic()
        _ = left >= seconds or self.log.write("skipped", self.part, what=what, needs=seconds, left=round(left, 1))
        return left >= seconds

    # -- what is decoded ---------------------------------------------------------------------------------------

    def side(self, size: int) -> int:
        """The height and width of the latents of a square picture of so many pixels each way."""
        return 1 + size // 1024 if self.small else size // 8

    def vae(self, model: str = "flux", dtype: str = "bfloat16", layout: Any = torch.channels_last) -> Any:
        """A decoder of full widths with seeded weights (``"flux"``, ``"flux2"``); the same one each time.

        Only the last dtype of each model is kept.
        """
        return torch.nn.Module.to(self._network(model, dtype), memory_format=layout)

    def _network(self, model: str, dtype: str) -> Any:
        """The same in whichever layout it is, which must not change while a decode of it is measured."""
        if (model, dtype) not in self._vaes:
            self._vaes = {key: vae for key, vae in self._vaes.items() if key[0] != model}
            self._vaes[model, dtype] = self._make(model, getattr(torch, dtype))
        return self._vaes[model, dtype]

    def _make(self, model: str, dtype: torch.dtype) -> Any:
        return full_vae(model, dtype, str(self.device))  # not rehearsed: full widths

    def ours(self, model: str = "flux", dtype: str = "bfloat16", **options: Any) -> ExactDecoder:
        """Our decoder, with the CUDA kernels or an error."""
        return ExactDecoder(self.vae(model, dtype), kernels="cuda", **options)

    def raw(self, model: str, size: int, batch: int, dtype: str) -> torch.Tensor:
        """Raw latents (batch, channels, side, side), which hold the same image throughout the batch."""
        generator, side = torch.Generator().manual_seed(0), self.side(size)
        one = torch.randn(1, self._network(model, dtype).config["latent_channels"], side, side, generator=generator)
        return one.expand(batch, -1, -1, -1).to(self.device, getattr(torch, dtype)).contiguous()

    def true(self, model: str, size: int, dtype: str) -> torch.Tensor:
        """diffusers' float64 decode of the same weights and latents, made on this card."""
        key = model, size, dtype
        if key not in self._truth:
            vae = torch.nn.Module.to(copy.deepcopy(self._network(model, dtype)), torch.float64)
            self._truth[key] = vae.decode(self.raw(model, size, 1, dtype).double(), return_dict=False)[0]
        return self._truth[key]

    # -- what is measured --------------------------------------------------------------------------------------

    def measure(
        self, engine: str, decode: Decode, *, model: str = "flux", size: int, batch: int = 1, dtype: str = "bfloat16",
        seconds: float = 1.5, **more: Any,
    ) -> Row:  # fmt: skip
        """Measure one decode and write its row, also where it fails; return the row.

        The row has the milliseconds, the peak of allocated memory above what was allocated before, the rms error
        against float64 up to 1024 pixels, and a digest of the first image, by which images of other parts and
        processes are compared with it.
        """
        row: Row = {"kind": "decode", "engine": engine, "model": model, "size": size, "batch": batch, "dtype": dtype}
        row |= more
        try:
            raw = self.raw(model, size, batch, dtype)
            begun = time.perf_counter()
            decode(raw)
            torch.cuda.synchronize()
            row["first_ms"] = 1e3 * (time.perf_counter() - begun)
            image, row["peak_bytes"] = peak_of(lambda: decode(raw))
            row |= timed(lambda: decode(raw), seconds=seconds)
            row["digest"] = digest(image[:1])
            if batch > 1:
                row["alike"] = torch.equal(image, image[:1].expand_as(image))
            if size <= TRUE_UP_TO and batch == 1:
                with suppress(torch.OutOfMemoryError):  # float64 needs much, which says nothing about this decode
                    row["rms_error"] = float((image.double() - self.true(model, size, dtype)).square().mean().sqrt())
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            self.clean()  # and raise where the context is lost
        self.row(**row)
        return row


def digest(image: torch.Tensor) -> str:
    """A short name for the very bits of an image."""
    return hashlib.sha256(image.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]
