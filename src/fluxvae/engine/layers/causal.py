"""Reads the layers of networks that are written for video, whose first frame is computed here: an image.

Such a network's convolutions are causal: around a frame they see the frames before it, and before the first there are
zeros. So for one frame only the last tap of a kernel counts. Resampling in time begins with the second frame. What is
left is two-dimensional, and made of the same layers as any other network, except that its norms are of each pixel.

Read from diffusers 0.42.1: ``autoencoders/autoencoder_kl_qwenimage.py``; the classes of ``autoencoder_kl_wan.py`` are
the same under other names.
"""

from __future__ import annotations

from typing import Any

from fluxvae.engine.layers import Layer, reading
from fluxvae.engine.layers.attention import Attention
from fluxvae.engine.layers.conv_in import ConvIn
from fluxvae.engine.layers.conv_out import ConvOut
from fluxvae.engine.layers.downsample import Downsample
from fluxvae.engine.layers.resnet import Resnet
from fluxvae.engine.layers.upsample import Upsample
from fluxvae.engine.records import Conv, PixelNorm, Projections

__all__ = ["attention", "conv_in", "conv_out", "down_layer", "kinds", "resnet", "upsample"]

NORMALIZE_EPS = 1e-12
"""The least length by which ``torch.nn.functional.normalize`` divides."""


def kinds(name: str) -> tuple[str, str]:
    """The names that diffusers gives one class for its two families of such networks."""
    return f"QwenImage{name}", f"Wan{name}"


def conv(name: str, module: Any, kernel: int) -> Conv:
    """Read a causal convolution of stride 1, ``kernel`` pixels high and wide and as many frames long."""
    module = reading.expect(name, module, *kinds("CausalConv3d"))
    pad = kernel // 2
    settings = (module.kernel_size, module.stride, module.dilation, module.groups, module.padding_mode, module.padding)
    around = (pad, pad, pad, pad, 2 * pad, 0)
    if settings != ((kernel,) * 3, (1,) * 3, (1,) * 3, 1, "zeros", (0,) * 3) or tuple(module._padding) != around:
        reading.refuse(name, module, f"a causal {kernel}x{kernel}x{kernel} convolution of stride 1 that keeps the size")
    return Conv(name, module.in_channels, module.out_channels, kernel, module, taps=kernel)


def norm(name: str, module: Any) -> PixelNorm:
    """Read an RMS norm over the channels of each pixel."""
    module = reading.expect(name, module, *kinds("RMS_norm"))
    channels = module.gamma.numel()
    if not module.channel_first or module.scale != channels**0.5:
        reading.refuse(name, module, "an RMS norm over channels, which come first")
    return PixelNorm(name, channels, NORMALIZE_EPS, hasattr(module.bias, "shape"), module)


def resnet(name: str, module: Any) -> Resnet:
    """Read a ``ResidualBlock``."""
    module = reading.expect(name, module, *kinds("ResidualBlock"))
    reading.silu(f"{name}.nonlinearity", module.nonlinearity)
    reading.no_dropout(f"{name}.dropout", module.dropout)
    conv1, conv2 = conv(f"{name}.conv1", module.conv1, 3), conv(f"{name}.conv2", module.conv2, 3)
    shortcut = None
    if not reading.is_of(module.conv_shortcut, "Identity"):
        shortcut = conv(f"{name}.conv_shortcut", module.conv_shortcut, 1)
    norms = norm(f"{name}.norm1", module.norm1), norm(f"{name}.norm2", module.norm2)
    return Resnet(name, norms[0], conv1, norms[1], conv2, shortcut, 1.0)


def attention(name: str, module: Any) -> Attention:
    """Read an ``AttentionBlock``, which attends to the pixels of one frame; its three projections are one module."""
    module = reading.expect(name, module, *kinds("AttentionBlock"))
    whole = reading.conv(f"{name}.to_qkv", module.to_qkv, 1)
    channels = whole.cin
    q, k, v = (Conv(whole.name, channels, channels, 1, whole.module, part=(part, 3)) for part in range(3))
    out = reading.conv(f"{name}.proj", module.proj, 1)
    return Attention(name, norm(f"{name}.norm", module.norm), Projections(q, k, v, out, channels**-0.5, True, 1.0))


def upsample(name: str, module: Any) -> Upsample:
    """Read a ``Resample`` that enlarges: by the nearest pixels (exactly twice), then a convolution."""
    module = reading.expect(name, module, *kinds("Resample"))
    if module.mode not in ("upsample2d", "upsample3d"):
        reading.refuse(name, module, "mode 'upsample2d' or 'upsample3d'")
    enlarge = reading.expect(f"{name}.resample.0", module.resample[0], *kinds("Upsample"))
    if enlarge.scale_factor != (2.0, 2.0) or enlarge.mode != "nearest-exact":
        reading.refuse(f"{name}.resample.0", enlarge, "nearest enlargement, twice each way")
    return Upsample(name, reading.conv(f"{name}.resample.1", module.resample[1], 3))


def downsample(name: str, module: Any) -> Downsample:
    """Read a ``Resample`` that halves: a convolution of stride 2 with zeros at the right and below."""
    module = reading.expect(name, module, *kinds("Resample"))
    if module.mode not in ("downsample2d", "downsample3d"):
        reading.refuse(name, module, "mode 'downsample2d' or 'downsample3d'")
    pad = reading.expect(f"{name}.resample.0", module.resample[0], "ZeroPad2d")
    if tuple(pad.padding) != (0, 1, 0, 1):
        reading.refuse(f"{name}.resample.0", pad, "zeros at the right and below")
    return Downsample(name, reading.conv(f"{name}.resample.1", module.resample[1], 3, stride=2))


def down_layer(name: str, module: Any) -> list[Layer]:
    """Read one of an encoder's layers, which do not stand in blocks there."""
    inner = reading.unwrapped(module)
    for read, kind in ((resnet, "ResidualBlock"), (attention, "AttentionBlock"), (downsample, "Resample")):
        if any(reading.is_of(inner, one) for one in kinds(kind)):
            return [read(name, module)]
    reading.refuse(name, module, "a residual block, attention or a downsampling")


def conv_in(name: str, module: Any, pointwise: Any = None) -> ConvIn:
    """Read the first convolution, and a decoder's ``post_quant_conv``."""
    before = None if pointwise is None else conv("post_quant_conv", pointwise, 1)
    return ConvIn(name, before, conv(name, module, 3))


def conv_out(name: str, module: Any, pointwise: Any = None) -> ConvOut:
    """Read the end of an encoder or a decoder, and an encoder's ``quant_conv``."""
    reading.silu(f"{name}.nonlinearity", module.nonlinearity)
    last = conv(f"{name}.conv_out", module.conv_out, 3)
    after = None if pointwise is None else conv("quant_conv", pointwise, 1)
    return ConvOut(last.name, norm(f"{name}.norm_out", module.norm_out), last, after)
