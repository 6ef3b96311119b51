"""Direct kernels, made of ordinary PyTorch calls, for any device and float32, bfloat16, float16 (float64 in tests).

Where values are rounded: diffusers rounds a half-precision map after GroupNorm and again after SiLU. Here affine and
SiLU are computed in float32 and rounded once. Convolutions, residual additions and projections round where diffusers'
do.

How blocks are laid out: on a CPU, oneDNN's float32 convolution adds all 9*cin products of a value in one chain when the
block is channels last, and in several shorter ones when it is channels first. That makes an error of 6.1e-7 against
2.2e-7 (128 channels, values near 1), and the latter is slower. diffusers runs the one that suits the memory format of
the model, and so do these kernels: for channels first, a block is transposed in cache on its way in. Half-precision
blocks, and blocks on other devices, stay channels last.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from fluxvae import devices
from fluxvae.engine.calls import Call, Kind, aligned
from fluxvae.engine.kernels import AttentionBlock, ConvBlock, Refill
from fluxvae.engine.kernels.direct import gpu, onednn, subpixel
from fluxvae.engine.kernels.direct.costs import UNFOLDED_BLOCK_VALUES, DirectCosts, padded_width
from fluxvae.engine.memory.heap import trim_heap
from fluxvae.engine.records import Conv, Norm, Projections, parameters
from fluxvae.engine.statistics import Affine, FiniteChecks, Moments, PixelScale, Scaling, block_moments

__all__ = ["TorchKernels"]


class TorchKernels(DirectCosts):
    """PyTorch's own convolution, matrix product and fused attention."""

    def __init__(self, device: torch.device, *, instead: str = "") -> None:
        """``instead``: why these kernels serve where faster ones were meant to, which plans print."""
        super().__init__(device.type, instead=instead)
        self._device = device
        self._transposes = devices.is_amd(device)
        # Asked once, so that a call is computed as it was planned, whatever another thread sets meanwhile.
        self._missing = None if device.type == "cpu" else gpu.library_missing()

    @property
    def note(self) -> str:
        """What is computed otherwise than one would expect, and why; usually nothing."""
        notes = [self._note] if self._note else []
        if (reason := devices.no_bfloat16(self._device)) is not None:
            notes.append(f"bfloat16 is computed in float32, because {reason}")
        if self._missing is not None:
            notes.append(f"convolutions are slow, because {self._missing}")
        return "; ".join(notes)

    @property
    def block_values(self) -> int | None:
        """As `DirectCosts`, but less where every block is unfolded."""
        return super().block_values if self._missing is None else UNFOLDED_BLOCK_VALUES

    def unfolds(self, itemsize: int) -> bool:
        """Whether a GPU convolves without its library: there is none, or it is switched off, or it fails its trial."""
        if self._device.type == "cpu":
            return False
        return self._missing is not None or bool(gpu.library_fault(self._device, itemsize))

    # -- what the sweeps ask -----------------------------------------------------------------------------------

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of the weights, or float32 for half precision where the device has no arithmetic for it.

        There PyTorch's convolution would unfold every block to nine times its size and, on a CPU, take a hundred times
        as long.
        """
        return stored if devices.computes_directly(stored, self._device) else torch.float32

    def prepare(self) -> float:
        """Do nothing, as there is nothing to compile."""
        return 0.0

    def session(self) -> AbstractContextManager[None]:
        """A context in which a GPU is the current one: PyTorch asks that one what its library can compute.

        It is also where the Triton language launches. On a CPU it changes nothing, as PyTorch's own threads serve.
        """
        return nullcontext() if self._device.type == "cpu" else torch.cuda.device(self._device)

    def affine(self, moments: Moments, norm: Norm, dtype: torch.dtype, checks: FiniteChecks) -> Affine:
        """The scale and shift, computed by PyTorch's operations in float64."""
        return moments.affine(norm, dtype, checks)

    def pointwise(self, latents: torch.Tensor, conv: Conv) -> torch.Tensor:
        """Compute it channels first as diffusers does, except on a GPU."""
        weight, bias = parameters(conv)
        weight, bias = weight.to(latents.dtype), None if bias is None else bias.to(latents.dtype)
        if self._device.type != "cpu":
            rows = latents.permute(1, 2, 0).contiguous()
            return _pixels(self._convolution(_image(rows), weight, bias)).contiguous()
        return F.conv2d(latents[None], weight, bias)[0].permute(1, 2, 0).contiguous()

    def load(self, conv: Conv, kind: Kind, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """(weight, bias), or for ``"up"`` the two row phases' summed kernels."""
        weight, bias = parameters(conv)
        bias = None if bias is None else bias.to(dtype)
        if kind == "up":
            return self._subpixel(weight, bias, dtype, into)
        if kind == "linear":
            weight = weight.reshape(conv.cout, conv.cin)
            if weight.dtype != dtype:
                weight = _carve(into, weight.shape, dtype).copy_(weight)
            return weight, bias
        # The layout is always the same, since oneDNN and cuDNN choose an algorithm by the layout of weights too.
        return self._weight(into, weight.shape, dtype).copy_(weight), bias

    def prologue(
        self, rows: torch.Tensor, norm: Scaling | None, silu: bool, out: torch.Tensor, work: torch.Tensor
    ) -> None:
        """Compute norm and SiLU in float32 at least, and round once."""
        if norm is None:
            if rows.data_ptr() != out.data_ptr():
                out.copy_(rows)
            return
        dtype = norm.scale.dtype
        wide = out
        if out.dtype != dtype:
            wide = _carve(work, rows.shape, dtype)
            rows, work = wide.copy_(rows), work[aligned(wide.nbytes) :]
        if isinstance(norm, PixelScale):
            length = _carve(work, torch.Size((*rows.shape[:-1], 1)), dtype)
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=length)
            rows = torch.div(rows, length.clamp_(min=norm.eps), out=wide)
        torch.addcmul(norm.shift, rows, norm.scale, out=wide)
        if silu:
            F.silu(wide, inplace=True)
        if wide is not out:
            out.copy_(wide)

    def refill(self, refill: Refill) -> None:
        """Move the halo rows, put the fresh rows through the prologue, and write the zeros below the map."""
        window = refill.window
        rows = len(window) - 2
        if refill.first:
            window[0].zero_()
        elif rows > 1:
            self.prologue(window[rows:], None, False, window[:2], refill.work)  # a copy, by the threads that it uses
        else:  # one by one, because the two ranges overlap
            window[0].copy_(window[1])
            window[1].copy_(window[2])
        fresh = window[slice(*refill.fresh)]
        if len(fresh):
            self._let_in(refill, fresh)
        if refill.bottom is not None:
            window[refill.bottom].zero_()

    def _let_in(self, refill: Refill, fresh: torch.Tensor) -> None:
        """Bring the map's next rows into their part of the window.

        All at once: PyTorch computes the last few values of a tensor, which fill no vector, by other instructions.
        """
        self.prologue(refill.source.take(fresh), refill.norm, True, fresh, refill.work)

    def moments(self, call: Call, blocks: int, room: torch.Tensor) -> Moments:
        """Statistics that are kept block by block; they take no room in the arena."""
        return Moments()

    def convolve(self, block: ConvBlock) -> None:
        """Compute the block by PyTorch's operations; the residual is added as the result is stored."""
        if block.kind == "linear":
            self._linear(block)
            return
        if block.kind == "up":
            self._upsample(block)
        elif block.kind == "down":
            self._downsample(block)
        else:
            self._conv3(block)
        if block.statistics is not None:
            block.statistics.add(block_moments(block.out, block.work))

    def _conv3(self, block: ConvBlock) -> None:
        weight, bias = block.weights
        result = self._conv(block.rows, weight, bias, block.work)
        if block.residual is None:
            block.out.copy_(result)
        else:
            torch.add(result, block.residual, out=block.out)
        del result  # now, or something small would be allocated in its place, and the next result elsewhere
        if block.scale != 1.0:
            block.out.div_(block.scale)

    def _upsample(self, block: ConvBlock) -> None:
        """Four 2x2 convolutions of the small map: both column phases of one row phase in one call.

        A row of the large map with phase 0 sees the small rows i-1 and i, with phase 1 the rows i and i+1; columns
        likewise, so phase 1's outputs stand one column further right. (width + 1) columns are computed for that.
        """
        n, width, channels = block.rows.shape[0] - 2, block.rows.shape[1], block.out.shape[2]
        phases = block.out.view(n, 2, width, 2, channels)
        kernels, bias = block.weights
        for p, kernel in enumerate(kernels):
            both = self._conv(block.rows[p : p + n + 1], kernel, bias, block.work)
            phases[:, p, :, 0].copy_(both[:, :width, :channels])
            phases[:, p, :, 1].copy_(both[:, 1:, channels:])
            del both

    def _downsample(self, block: ConvBlock) -> None:
        """One convolution of stride 2 of the block with its column of zeros at the right, as diffusers computes it."""
        weight, bias = block.weights
        rows, width, channels = block.rows.shape
        image = self._padded(block.work, (rows - 1, padded_width(width), channels), block.rows.dtype)
        image[..., :width].copy_(_image(block.rows[1:]))
        image[..., width:].zero_()
        result = _pixels(self._convolution(image, weight, bias, stride=2))
        block.out.copy_(result[:, : width // 2])

    def _padded(self, work: torch.Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """The start of the workspace as a (1, C, n, W) image in the layout that blocks are convolved in."""
        rows, width, channels = shape
        if self._first(dtype.itemsize):
            return _carve(work, torch.Size((1, channels, rows, width)), dtype)
        return _image(_carve(work, torch.Size(shape), dtype))

    def _linear(self, block: ConvBlock) -> None:
        """A matrix product over all pixels of the block."""
        weight, bias = block.weights
        flat, result = block.rows.view(-1, block.rows.shape[-1]), block.out.view(-1, block.out.shape[-1])
        _project(flat, weight, bias, result)

    def load_attention(self, projections: Projections, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """The (weight, bias) of q, k, v and out."""
        convs = (projections.q, projections.k, projections.v, projections.out)
        return [self.load(conv, "linear", dtype, part) for conv, part in zip(convs, into.chunk(4), strict=False)]

    def attend(self, block: AttentionBlock) -> None:
        """Attend with one head, for which the normalised map n serves as keys and values at once.

        Neither projection of n is ever stored. For the keys, q . (Wk n + bk) = (q Wk) . n + constant, and softmax does
        not change with a constant per query. For the values, the weights of a query sum to one, and therefore
        sum_j p_j (Wv n_j + bv) = Wv (sum_j p_j n_j) + bv.

        The projections go back and forth between two results in the arena; attention's own is PyTorch's.
        """
        (wq, bq), (wk, _), (wv, bv), (wo, bo) = block.weights
        layer, out, tokens = block.projections, block.out, block.tokens[None, None]
        if self._device.type == "cpu":
            trim_heap()  # or results may come to lie beside those of the last call, as `onednn.HEAP_BYTES` explains
        flat = block.queries.view(-1, block.queries.shape[-1])
        first = _carve(block.work, flat.shape, flat.dtype)
        second = _carve(block.work[aligned(first.nbytes) :], flat.shape, flat.dtype)
        _project(flat, wq, bq, first)
        _project(first, wk.t(), None, second)
        mixed = F.scaled_dot_product_attention(second[None, None], tokens, tokens, scale=layer.softmax_scale)[0, 0]
        _project(mixed, wv, bv, first)
        del mixed  # as in `_conv3`
        _project(first, wo, bo, second)
        if layer.residual:
            out.add_(second.view_as(out))
        else:
            out.copy_(second.view_as(out))
        if layer.scale != 1.0:
            out.div_(layer.scale)
        if block.statistics is not None:
            block.statistics.add(block_moments(out, block.work))

    def _conv(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: torch.Tensor
    ) -> torch.Tensor:
        """Convolve rows, with zeros left and right of them and none above or below."""
        image = _image(rows)
        if self._first(rows.dtype.itemsize):
            image = _carve(work, image.shape, rows.dtype).copy_(image)
        return _pixels(self._convolution(image, weight, bias))

    def _convolution(
        self, image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, stride: int = 1
    ) -> torch.Tensor:
        """Convolve (1, C, n, W), with zeros left and right if the stride is 1, by what serves on this device."""
        if self._onednn:
            return onednn.convolve(image, weight, bias, stride=stride)
        return gpu.convolve(image, weight, bias, stride=stride, library=not self.unfolds(image.dtype.itemsize))

    def _weight(self, into: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The start of ``into`` as a (cout, cin, h, w) weight in the layout `_conv` wants."""
        if self._first(dtype.itemsize):
            return _carve(into, shape, dtype)
        cout, cin, height, width = shape
        return _carve(into, torch.Size((cout, height, width, cin)), dtype).permute(0, 3, 1, 2)

    def _subpixel(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, into: torch.Tensor) -> Any:
        """One (2*cout, cin, 2, 2) kernel for each row phase, with its two column phases one after the other."""
        cout, cin = weight.shape[:2]
        shape = torch.Size((2 * cout, cin, 2, 2))
        kernels = [self._weight(half, shape, dtype) for half in into.chunk(2)]
        subpixel.sum_kernels(weight, kernels, self.fuse_chunk)
        return kernels, None if bias is None else torch.cat([bias, bias])


def _project(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """``rows @ weight.T + bias`` of (n, cin) rows, written to ``out``."""
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _image(rows: torch.Tensor) -> torch.Tensor:
    """(n, W, C) rows as the (1, C, n, W) channels-last image they already are.

    The stride of the batch decides whether PyTorch sees channels last. On a CPU it does not matter, and may not change.
    """
    return rows.permute(2, 0, 1).unsqueeze(0) if rows.device.type == "cpu" else rows.unsqueeze(0).permute(0, 3, 1, 2)


def _pixels(image: torch.Tensor) -> torch.Tensor:
    """The (1, C, n, W) image as the (n, W, C) rows that it is."""
    return image.squeeze(0).permute(1, 2, 0)


def _carve(work: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The start of the workspace as a tensor of this shape and dtype."""
    return work[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
