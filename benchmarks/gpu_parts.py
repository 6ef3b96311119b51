"""What `gpu.py` measures below a whole decode: what the card can do, our kernels against plain PyTorch, attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fluxvae.engine.calls import Geometry
from fluxvae.engine.kernels.cuda import attention as attention_kernel
from fluxvae.engine.kernels.cuda import passes as kernel_passes
from fluxvae.engine.kernels.direct.costs import DirectCosts
from fluxvae.engine.network import Network
from fluxvae.engine.sweep.carving import State

Row = dict[str, Any]


def timed(call: Callable[[], Any], device: torch.device, *, seconds: float = 1.0, most: int = 20) -> Row:
    """Time a call and return the median, the least and the most, in milliseconds, after one call to warm up.

    On a GPU CUDA events measure it, three times at least and then up to ``most`` times within ``seconds``. On a CPU it
    is measured once, by the clock.
    """
    call()
    least, most = (3, most) if device.type == "cuda" else (1, 1)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or (len(times) < most and time.perf_counter() - begun < seconds):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            at = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - at))
    return {"ms": statistics.median(times), "ms_least": min(times), "ms_most": max(times), "runs": len(times)}


def card(device: torch.device, small: bool) -> Row:
    """Measure what this card can do: matrix products in bfloat16 and float32 (no TF32), and copies on it and to it."""
    rates: Row = {}
    for name, dtype, n in (("bfloat16", torch.bfloat16, 8192), ("float32", torch.float32, 4096)):
        n = 64 if small else n
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ms = timed(lambda a=a, b=b: a @ b, device)["ms"]  # type: ignore[misc]
        rates[f"tflops_{name}"] = 2 * n**3 / ms / 1e9
    nbytes = 1 << (16 if small else 30)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    rates["copy_gb_per_second"] = 2 * nbytes / timed(lambda: target.copy_(source), device)["ms"] / 1e6
    host = torch.empty(nbytes // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    part = source[: len(host)]
    rates["to_host_gb_per_second"] = len(host) / timed(lambda: host.copy_(part, non_blocking=True), device)["ms"] / 1e6
    rates["from_host_gb_per_second"] = (
        len(host) / timed(lambda: part.copy_(host, non_blocking=True), device)["ms"] / 1e6
    )
    return rates


def traffic(network: Network, height: int, width: int, itemsize: int) -> int:
    """Return how many bytes a decode must move if each layer reads its maps from memory once, and writes them once.

    They are the bytes that would pass between memory and disk if every map were spilled, and the latents and the image.
    """
    geometry, costs = Geometry(height, width, itemsize), DirectCosts("cpu")
    size, state, moved = (height, width), State("memory"), height * width * network.in_channels * itemsize
    for layer in network.layers:
        choices = list(layer.choices(geometry, costs, size, state))
        spilled = [choice for choice in choices if {choice[0].middle, choice[0].out} <= {None, "spill"}]
        planned, state = (spilled or choices)[0]
        moved += sum(step.moved for step in planned.steps)
        size = layer.size_after(size)
    return moved + size[0] * size[1] * network.out_channels * itemsize


def passes(device: torch.device, small: bool) -> Iterator[Row]:
    """Measure each pass over memory on a block of the last level, and the same computation in plain PyTorch."""
    rows, width, channels = (5, 6, 16) if small else (128, 1024, 128)
    for dtype in (torch.bfloat16, torch.float32):
        block = torch.randn(rows, width, channels, device=device).to(dtype)
        residual, out = torch.randn_like(block), torch.empty_like(block)
        bias = torch.randn(channels, device=device).to(dtype)
        scale, shift = torch.randn(2, channels, device=device)
        pixels = rows * width
        parts = torch.empty(kernel_passes.parts_bytes(2 * pixels, channels, 2) // 4, device=device)

        def plain_prologue(x: torch.Tensor = block, a: torch.Tensor = scale, b: torch.Tensor = shift) -> torch.Tensor:
            return F.silu(torch.addcmul(b, x.float(), a)).to(x.dtype)

        def plain_finish(
            x: torch.Tensor = block, b: torch.Tensor = bias, r: torch.Tensor = residual, n: int = channels
        ) -> Any:
            done = x + b + r
            return done, torch.var_mean(done.view(-1, n).float(), 0)

        def ours_finish(
            x: torch.Tensor = block, b: torch.Tensor = bias, r: torch.Tensor = residual, o: torch.Tensor = out,
            p: torch.Tensor = parts, n: int = pixels, c: int = channels,
        ) -> None:  # fmt: skip
            kernel_passes.finish(x, b, r, 1.0, o, p)
            kernel_passes.combine(p, n, c)

        phases = torch.randn(rows, width + 1, 2 * channels, device=device).to(dtype)
        large = torch.empty(2 * rows, 2 * width, channels, dtype=dtype, device=device)

        def plain_interleave(
            x: torch.Tensor = phases, o: torch.Tensor = large, w: int = width, c: int = channels, n: int = rows
        ) -> None:
            view = o.view(n, 2, w, 2, c)
            view[:, 0, :, 0].copy_(x[:, :w, :c])
            view[:, 0, :, 1].copy_(x[:, 1:, c:])

        name, size = str(dtype)[6:], block.numel() * dtype.itemsize
        cases: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
            ("prologue", lambda b=block, a=scale, s=shift, o=out: kernel_passes.prologue(b, a, s, True, o),
             plain_prologue, 2 * size),
            ("finish", ours_finish, plain_finish, 3 * size),
            ("interleave", lambda x=phases, b=bias, o=large, p=parts: kernel_passes.interleave(x, b, 0, o, p),
             plain_interleave, 4 * size),
        ]  # fmt: skip
        for what, ours, plain, nbytes in cases:
            ms, theirs = timed(ours, device)["ms"], timed(plain, device)["ms"]
            yield {"part": what, "dtype": name, "ms": ms, "plain_ms": theirs, "gb_per_second": nbytes / ms / 1e6}


def attention(device: torch.device, small: bool) -> Iterator[Row]:
    """Measure attention with a head of 512, in every cut of our kernel and as PyTorch does it.

    Each row holds the time, the rate, and the error against float64.
    """
    for tokens in (20,) if small else (4096, 16384):
        for dtype in (torch.bfloat16, torch.float32):
            dim = 16 if small else 512
            q, kv = (torch.randn(tokens, dim, device=device).to(dtype) for _ in range(2))
            true = _true_attention(q[:64], kv)
            ways: dict[str, Callable[[], torch.Tensor]] = {"PyTorch": lambda q=q, kv=kv: _pytorchs(q, kv)}
            for cut in attention_kernel.CUTS if dtype.itemsize == 2 else (attention_kernel.SMALLEST,):
                ways[f"ours {cut}"] = lambda q=q, kv=kv, cut=cut: _ours(q, kv, cut)
            for name, call in ways.items():
                row: Row = {"part": f"attention {tokens}", "dtype": str(dtype)[6:], "way": name}
                try:
                    error = float((call()[:64].double() - true).abs().max())
                    row |= timed(call, device)
                    yield row | {"error": error, "tflops": 4 * tokens**2 * dim / row["ms"] / 1e9}
                except Exception as error_:  # this card has no room for the cut, or the kernel does not compile
                    yield row | {"failed": f"{type(error_).__name__}: {str(error_)[:200]}"}


def _pytorchs(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q[None, None], kv[None, None], kv[None, None])[0, 0]


def _ours(q: torch.Tensor, kv: torch.Tensor, cut: attention_kernel.Cut) -> torch.Tensor:
    out = torch.empty_like(q)
    attention_kernel.attention(q, kv, q.shape[1] ** -0.5, out, cut)
    return out


def _true_attention(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    q, kv = q.double(), kv.double()
    return (q @ kv.T * q.shape[1] ** -0.5).softmax(1) @ kv
