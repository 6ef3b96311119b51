"""What the card itself can do, and our kernels against plain PyTorch: convolutions, passes, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fluxvae.engine.calls import Geometry
from fluxvae.engine.kernels.cuda import attention as attention_kernel
from fluxvae.engine.kernels.cuda import passes as kernel_passes
from fluxvae.engine.kernels.direct import cudnn
from fluxvae.engine.kernels.direct.costs import DirectCosts, workspace_bound
from fluxvae.engine.network import Network
from fluxvae.engine.sweep.carving import State
from gpu_run.bench import Bench
from gpu_run.timing import Row, peak_of, timed

__all__ = ["attention", "convolutions", "passes", "rates", "rates_and_floor"]

CONVOLUTIONS = ((512, 512, 128), (512, 512, 256), (512, 256, 512), (256, 256, 512), (256, 128, 1024), (128, 128, 1024))
"""Channels in and out, and the width of the map, of FLUX's 3x3 convolutions at 1024 pixels."""
CUTS = ((64, 64, 16, 2), (64, 32, 8, 3), (64, 16, 8, 2), (32, 32, 8, 1))
"""Cuts of attention that no card gets today, beside those that some card gets."""


def rates(bench: Bench, seconds: float = 0.5) -> dict[str, float]:
    """Measure matrix products in bfloat16 and float32 (no TF32), and copies on the card, to it and from it."""
    found: dict[str, float] = {}
    for name, n in (("bfloat16", 8192), ("float32", 4096)):
        n = 64 if bench.small else n
        a, b = (torch.randn(n, n, device=bench.device).to(getattr(torch, name)) for _ in range(2))
        found[f"tflops_{name}"] = 2 * n**3 / _ms(lambda a=a, b=b: a @ b, seconds) / 1e9  # type: ignore[misc]
    nbytes = 1 << (16 if bench.small else 30)
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    found["copy_gb_per_second"] = 2 * nbytes / _ms(lambda: target.copy_(source), seconds) / 1e6
    host, part = torch.empty(nbytes // 4, dtype=torch.uint8, pin_memory=not bench.small), source[: nbytes // 4]
    found["to_host_gb_per_second"] = len(host) / _ms(lambda: host.copy_(part, non_blocking=True), seconds) / 1e6
    found["from_host_gb_per_second"] = len(host) / _ms(lambda: part.copy_(host, non_blocking=True), seconds) / 1e6
    return found


def rates_and_floor(bench: Bench) -> None:
    """The rates, and what a decode would take at least at them: its products, and its bytes moved once."""
    found = rates(bench)
    bench.row(kind="rates", **found)
    for size in (512, 1024, 2048, 4096):
        engine, side = bench.ours(), bench.side(size)
        macs, moved = engine.plan(side, side).macs, traffic(engine.network, side, side, 2)
        compute, memory = 2 * macs / found["tflops_bfloat16"] / 1e9, moved / found["copy_gb_per_second"] / 1e6
        bench.row(
            kind="floor", size=size, tera_operations=2 * macs / 1e12, gigabytes=moved / 1e9, compute_ms=compute,
            memory_ms=memory, ms=max(compute, memory),
        )  # fmt: skip


def traffic(network: Network, height: int, width: int, itemsize: int) -> int:
    """How many bytes a decode must move if each layer reads its maps from memory once, and writes them once.

    They are the bytes that would pass between memory and disk if every map were spilled, and the latents and the image.
    """
    geometry, costs = Geometry(height, width, itemsize), DirectCosts("cpu")
    size, state, moved = (height, width), State("memory"), height * width * network.in_channels * itemsize
    for index, layer in enumerate(network.layers):
        choices = list(layer.choices(geometry, costs, size, state, wanted=network.wanted(index)))
        spilled = [choice for choice in choices if {choice[0].middle, choice[0].out} <= {None, "spill"}]
        planned, state = (spilled or choices)[0]
        moved += sum(step.moved for step in planned.steps)
        size = layer.size_after(size)
    return moved + size[0] * size[1] * network.out_channels * itemsize


def convolutions(bench: Bench) -> None:
    """cuDNN by shape: a block of rows as the engine cuts it, the whole map, and with the algorithm chosen by timing."""
    for cin, cout, width in CONVOLUTIONS:
        if bench.small:
            cin, cout, width = 8, 8, 8
        budget = (1 << 23) * max(256, cin, cout) // 256  # `Geometry.block`, with the block of `CudaKernels`
        for what, rows in (("block", min(width, max(1, budget // (width * max(cin, cout))))), ("whole", width)):
            x = torch.randn(rows + 2, width, cin, device=bench.device).bfloat16()
            weight = (torch.randn(cout, 3, 3, cin, device=bench.device).bfloat16() / 32).permute(0, 3, 1, 2)
            out = torch.empty(rows, width, cout, dtype=x.dtype, device=bench.device)
            ms = _ms(lambda x=x, w=weight, o=out: cudnn.convolve(x, w, o), 0.2)
            row: Row = {"kind": "convolution", "shape": f"{cin}>{cout} {rows}x{width}", "what": what, "ms": ms}
            row["tflops"] = 18 * cin * cout * rows * width / ms / 1e9
            image = x.unsqueeze(0).permute(0, 3, 1, 2)
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                row["benchmarked_ms"] = _ms(lambda i=image, w=weight: F.conv2d(i, w, padding=(0, 1)), 0.2)
            _, row["workspace_bytes"] = peak_of(lambda x=x, w=weight, o=out: cudnn.convolve(x, w, o))  # type: ignore[misc]
            bench.row(**row, workspace_bound=workspace_bound((rows + 2, width, cin), (cout, 3, 3), 2))


def passes(bench: Bench) -> None:
    """Each pass over memory on a block of the last level, and the same computation in plain PyTorch."""
    rows, width, channels = (5, 6, 16) if bench.small else (64, 1024, 128)
    for dtype in (torch.bfloat16, torch.float32):
        block = torch.randn(rows, width, channels, device=bench.device).to(dtype)
        window = torch.zeros(rows + 2, width, channels, dtype=dtype, device=bench.device)
        residual, out = torch.randn_like(block), torch.empty_like(block)
        bias = torch.randn(channels, device=bench.device).to(dtype)
        scale, shift = torch.randn(2, channels, device=bench.device)
        phases = torch.randn(rows, width + 1, 2 * channels, device=bench.device).to(dtype)
        large = torch.empty(2 * rows, 2 * width, channels, dtype=dtype, device=bench.device)
        nbytes = kernel_passes.parts_bytes(2 * rows * width, channels, 2)
        parts = torch.empty(nbytes // 4, device=bench.device)
        plain = _Plain(block, scale, shift, bias, residual, phases, large)
        size = block.numel() * dtype.itemsize
        cases: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
            (
                "refill",
                lambda r=block, a=scale, b=shift, w=window, n=rows: kernel_passes.refill(
                    w, False, (2, n + 2), None, r, a, b
                ),
                plain.prologue,
                2 * size,
            ),
            (
                "prologue",
                lambda r=block, a=scale, b=shift, o=out: kernel_passes.prologue(r, a, b, True, o),
                plain.prologue,
                2 * size,
            ),
            (
                "finish",
                lambda x=block, b=bias, r=residual, o=out, p=parts: kernel_passes.finish(x, b, r, 1.0, o, p),
                plain.finish,
                3 * size,
            ),
            (
                "interleave",
                lambda x=phases, b=bias, o=large, p=parts: kernel_passes.interleave(x, b, 0, o, p),
                plain.interleave,
                4 * size,
            ),
        ]
        for what, ours, theirs, moved in cases:
            ms = _ms(ours, 0.2)
            bench.row(
                kind="pass", what=what, dtype=str(dtype)[6:], ms=ms, plain_ms=_ms(theirs, 0.2),
                gb_per_second=moved / ms / 1e6,
            )  # fmt: skip


class _Plain:
    """What the passes compute, in PyTorch's own operations."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.block, self.scale, self.shift, self.bias, self.residual, self.phases, self.large = tensors

    def prologue(self) -> torch.Tensor:
        return F.silu(torch.addcmul(self.shift, self.block.float(), self.scale)).to(self.block.dtype)

    def finish(self) -> Any:
        done = self.block + self.bias + self.residual
        return done, torch.var_mean(done.view(-1, done.shape[-1]).float(), 0)

    def interleave(self) -> None:
        rows, width, channels = self.block.shape
        view = self.large.view(rows, 2, width, 2, channels)
        view[:, 0, :, 0].copy_(self.phases[:, :width, :channels])
        view[:, 0, :, 1].copy_(self.phases[:, 1:, channels:])


def attention(bench: Bench) -> None:
    """Attention with a head of 512: PyTorch's, and ours in every cut; their rates, and errors against float64."""
    for tokens in (20,) if bench.small else (16384, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            dim = 16 if bench.small else 512
            q, kv = (torch.randn(tokens, dim, device=bench.device).to(dtype) for _ in range(2))
            true = ((q[:64].double() @ kv.double().T) * dim**-0.5).softmax(1) @ kv.double()
            ways: dict[str, Callable[[], torch.Tensor]] = {"PyTorch": lambda q=q, kv=kv: _pytorchs(q, kv)}
            ours = [*attention_kernel.CUTS, *map(attention_kernel.Cut._make, CUTS)]
            for cut in ours if dtype.itemsize == 2 else [attention_kernel.SMALLEST]:
                ways[f"ours {tuple(cut)}"] = lambda q=q, kv=kv, cut=cut: _ours(q, kv, cut)
            for name, call in ways.items():
                row: Row = {"kind": "attention", "tokens": tokens, "dtype": str(dtype)[6:], "way": name}
                try:
                    row["error"] = float((call()[:64].double() - true).abs().max())
                    row |= timed(call, seconds=0.3)
                    row["tflops"] = 4 * tokens**2 * dim / row["ms"] / 1e9
                except Exception as error:  # this card has no room for the cut, or the kernel does not compile
                    row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                    bench.clean()
                bench.row(**row)


def _pytorchs(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q[None, None], kv[None, None], kv[None, None])[0, 0]


def _ours(q: torch.Tensor, kv: torch.Tensor, cut: attention_kernel.Cut) -> torch.Tensor:
    out = torch.empty_like(q)
    attention_kernel.attention(q, kv, q.shape[1] ** -0.5, out, cut)
    return out


def _ms(call: Callable[[], Any], seconds: float) -> float:
    call()  # to warm up
    return float(timed(call, seconds=seconds)["ms"])
