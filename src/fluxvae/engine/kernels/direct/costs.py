"""What the direct kernels cost: bytes and multiply-adds. This module does not import PyTorch."""

from __future__ import annotations

from fluxvae.engine import torch_library
from fluxvae.engine.calls import Call, aligned

__all__ = ["GPU_BLOCK_VALUES", "ROUNDING_BYTES", "DirectCosts", "padded_width", "workspace_bound"]

GPU_BLOCK_VALUES = 1 << 23
"""Values of a block of rows on a GPU: 16 MB in half precision. Larger blocks take fewer launches, and smaller ones
leave more of a tight limit to the maps. docs/notebook.md has what is planned with each, benchmarks/gpu.py measures."""
UNFOLDED_BLOCK_VALUES = 1 << 20
"""The same where convolutions unfold a block to nine times its size (`DirectCosts.unfolds`)."""
HALF_BYTES = 32 << 20
"""More bytes than any workspace of cuDNN's takes in half precision."""
CUBLAS_BYTES = 32 << 20
"""Bytes of cuBLAS's workspace on Hopper, which PyTorch allocates once per stream. Other cards take 8 MiB."""
ONEDNN_BYTES = 7 << 20
"""Bytes by which the code that oneDNN generates in float32 may exceed `calls.RUNTIME_BYTES`. It has code for every size
of a convolution and of a block. FLUX's VAE takes 4 MB of it, and Qwen-Image's encoder, whose every level has other
widths, 11."""
ROUNDING_BYTES = 4 << 20
"""Bytes that PyTorch's allocator on a GPU may hand out beyond what was asked for: up to 1 MiB for each of the arena,
the image, cuDNN's workspace and the rows of spilled maps on their way."""


def padded_width(width: int) -> int:
    """Columns of a block that is to be halved, with those of zeros: at least five, so that there are two results.

    Where there is one column of results and there are six rows of them or more, oneDNN's bfloat16 convolution for AMX
    (PyTorch 2.13) writes garbage.
    """
    return max(width + 1, 5)


def workspace_bound(shape: tuple[int, int, int], kernel: tuple[int, int, int], itemsize: int) -> int:
    """Bytes that cuDNN allocates during one `convolve`, at most.

    It depends on the algorithm that cuDNN picks. cuDNN 9 was asked, for described cards, about 2,600 convolutions of
    blocks of rows: in half precision none takes more than 22 MB, in float32 none more than its input, its result and
    four times its weights, and 1 MiB.

    Args:
        shape: (n, W, cin) of the rows.
        kernel: (cout, kh, kw).
    """
    (n, width, cin), (cout, height, across) = shape, kernel
    values = n * width * cin + n * (width + 1) * cout + 4 * cout * height * across * cin
    bound = values * itemsize + (1 << 20)
    return min(bound, HALF_BYTES) if itemsize == 2 else bound


def _attention_pieces(queries: int, keys: int, channels: int) -> int:
    """Bytes that PyTorch's fused attention takes on a CPU for the scores, sums and results that its threads are at.

    Source: ATen's ``FlashAttentionKernel.cpp``, where each thread has a piece of the queries and one of the keys.
    """
    piece = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    return torch_library.threads() * piece * (min(keys, 512) + 2 + channels) * 4


def _blocked(channels: int) -> int:
    """Channels that an image has in oneDNN's own order, which is in blocks of 16: a picture's three become sixteen."""
    return -(-channels // 16) * 16


class DirectCosts:
    """PyTorch's own convolution, matrix product and fused attention: see `fluxvae.engine.calls.Costs`."""

    name = "torch"
    row_multiple = precise_row_multiple = 1
    block_factor = 1
    fuse_chunk = 16
    """How many output channels' kernels are summed at a time, so that the float64 temporaries stay at about 1 MB."""

    def __init__(self, device_type: str, *, instead: str = "") -> None:
        """``instead``: why these kernels serve where faster ones were meant to, which plans print."""
        self._note = instead
        self._device_type = device_type
        self._onednn = device_type == "cpu" and torch_library.has_onednn()
        self._transposes = False
        self.channels_last = False

    @property
    def note(self) -> str:
        """Why these kernels serve where others were meant to; usually nothing."""
        return self._note

    @property
    def block_values(self) -> int | None:
        """Values of a block of rows: more on a GPU, where fewer launches matter more than a core's cache."""
        return None if self._device_type == "cpu" else GPU_BLOCK_VALUES

    def unfolds(self, itemsize: int) -> bool:
        """Whether a GPU's convolutions do without cuDNN: PyTorch's own, which unfold the block and multiply."""
        return False

    @property
    def stages_spills(self) -> bool:
        """Whether rows of spilled maps are held on the device on their way, as on a GPU. Files are read into place."""
        return self._device_type != "cpu"

    def runtime_bytes(self, itemsize: int) -> int:
        """On a GPU cuBLAS's workspace, and what PyTorch's allocator rounds up; on a CPU more code of oneDNN's."""
        if self._device_type == "cpu":
            return ONEDNN_BYTES if itemsize == 4 else 0
        return CUBLAS_BYTES + ROUNDING_BYTES

    def reads_in_place(self, call: Call) -> bool:
        """Never: libraries pad what they are given, and know nothing of norms."""
        return False

    def blocks_at_once(self, call: Call) -> int:
        """One."""
        return 1

    def macs(self, call: Call) -> int:
        """Multiply-adds that one call computes."""
        pixels = call.rows * call.width
        if call.kind == "conv3":
            return 9 * call.cin * call.cout * pixels
        if call.kind == "up":
            return 16 * call.cin * call.cout * call.rows * (call.width + 1)
        if call.kind == "down":
            return 9 * call.cin * call.cout * call.out(call.rows) * call.out(call.width)
        if call.kind == "linear":
            return call.cin * call.cout * pixels
        return pixels * (2 * call.tokens * call.cin + 4 * call.cin * call.cin)

    def loaded(self, call: Call) -> int:
        """Bytes of the arena for weights: a channels-last copy, or an upsample's summed kernels.

        The weights of projections and other 1x1 convolutions are only copied where they are cast.
        """
        taps = {"conv3": 9, "up": 16, "down": 9, "linear": 1, "attend": 4}[call.kind]
        if call.kind in ("linear", "attend") and not call.cast:
            return 0
        return taps * call.cin * call.cout * call.itemsize

    def overhead(self, call: Call) -> int:
        """Bytes outside the arena during one call: PyTorch's result, and what the convolution takes beside it.

        On a CPU that is oneDNN's reordered weights, and on a GPU cuDNN's workspace or an unfolded block.
        """
        pixels = call.rows * call.width
        if call.kind == "conv3":
            return self._conv_bytes(call, (call.rows + 2, call.width), pixels, (call.cout, 3, 3))
        if call.kind == "up":
            summing = self.fuse_chunk * call.cin * 16 * 8
            phases = call.rows * (call.width + 1)
            size = call.rows + 1, call.width
            return max(self._conv_bytes(call, size, phases, (2 * call.cout, 2, 2)), summing)
        if call.kind == "down":
            pixels = call.out(call.rows) * max(call.out(call.width), 2)
            size = call.rows + 1, call.width if self._device_type == "cpu" else padded_width(call.width)
            return self._conv_bytes(call, size, pixels, (call.cout, 3, 3))
        if call.kind == "linear":
            return 0
        packed = 2 * call.tokens * call.cin * call.itemsize if call.itemsize == 2 else 0
        pieces = _attention_pieces(pixels, call.tokens, call.cin) if self._device_type == "cpu" else 0
        return pixels * call.cin * call.itemsize + packed + pieces

    def _conv_bytes(self, call: Call, size: tuple[int, int], pixels: int, kernel: tuple[int, int, int]) -> int:
        """Bytes that one convolution allocates, its result among them.

        On a CPU these are the reordered weights and, channels first, the input in oneDNN's own order. A GPU without its
        library takes the block, the weights and the result channels first, and the block unfolded, in which every pixel
        of the result has its whole neighbourhood (``slow_conv2d_forward`` in ATen's ``ConvolutionMM2d.cu``). MIOpen
        too takes all three channels first.

        Args:
            size: rows and columns of what is convolved.
            pixels: of the result.
            kernel: (cout, kh, kw).
        """
        (rows, width), (cout, height, across) = size, kernel
        given, made, weights = rows * width * call.cin, pixels * cout, cout * height * across * call.cin
        if self._device_type == "cpu":
            blocked = rows * width * _blocked(call.cin) if self._first(call.itemsize) else 0
            return (blocked + made + weights) * call.itemsize
        if self.unfolds(call.itemsize):
            return (given + weights + height * across * call.cin * pixels + made) * call.itemsize
        turned = (given + weights) * call.itemsize if self._transposes else 0
        return made * call.itemsize + turned + workspace_bound((rows, width, call.cin), kernel, call.itemsize)

    def _first(self, itemsize: int) -> bool:
        """Whether blocks are convolved channels first."""
        return self._onednn and itemsize == 4 and not self.channels_last

    def statistics(self, call: Call, blocks: int) -> tuple[int, int]:
        """None: the few numbers that are kept of each block are combined before they are many (see `Moments`)."""
        return 0, 0

    def workspace(self, call: Call) -> int:
        """Bytes of the arena during one call: the block once more in float32 at least, for statistics and prologue.

        Attention has two results of its projections there too, and a norm of each pixel the lengths of the pixels.
        """
        if not call.by_pixel:
            return self._block_bytes(call)
        return aligned(self._block_bytes(call)) + (call.rows + 1) * call.width * max(4, call.itemsize)

    def _block_bytes(self, call: Call) -> int:
        pixels = call.out(call.rows) * call.out(call.width)
        wide = max(4, call.itemsize)
        moments = pixels * call.cout * wide if call.statistics and call.kind != "linear" else 0
        if call.kind == "attend":
            moments = max(moments, 2 * aligned(pixels * call.cin * call.itemsize))
        if call.kind == "down":  # the block once more, with its column of zeros
            return max(moments, (call.rows + 1) * padded_width(call.width) * call.cin * call.itemsize)
        if self._first(call.itemsize) and call.kind in ("conv3", "up"):
            return max(moments, (call.rows + 2) * call.width * call.cin * call.itemsize)
        if call.kind == "up" or call.itemsize == wide:
            return moments
        # In half precision the prologue computes in float32. That of a map's first block has one row more than a block.
        return max(moments, (pixels + call.width) * call.cin * wide)
