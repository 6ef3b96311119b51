"""Reads the encoder or the decoder of one of diffusers' VAEs as a row of layers.

Only this module lists the kinds of layers, and the two kinds of networks: those of ``AutoencoderKL``, and those that
are written for video (`layers.causal`), of which one frame is computed. Read from diffusers 0.42.1:
``autoencoders/vae.py`` (Encoder, Decoder), ``unets/unet_2d_blocks.py`` (UNetMidBlock2D, DownEncoderBlock2D,
UpDecoderBlock2D), ``autoencoder_kl_qwenimage.py`` and ``autoencoder_kl_wan.py``. What is inside these blocks, each kind
of layer reads for itself. Importing this module does not import PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fluxvae.engine.layers import Layer, Wanted, causal, reading
from fluxvae.engine.layers.attention import Attention
from fluxvae.engine.layers.conv_in import ConvIn
from fluxvae.engine.layers.conv_out import ConvOut
from fluxvae.engine.layers.downsample import Downsample
from fluxvae.engine.layers.resnet import Resnet
from fluxvae.engine.layers.upsample import Upsample
from fluxvae.engine.records import made_precise
from fluxvae.engine.way import DECODE, ENCODE, Way
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

__all__ = ["Network", "precise", "read_network"]


@dataclass(frozen=True)
class Network:
    """An encoder or a decoder in the order of its computation. The names are diffusers'."""

    way: Way
    first: ConvIn
    middle: tuple[Layer, ...]
    last: ConvOut
    clamps: bool = False
    """Whether what is made is clamped to [-1, 1], as some of diffusers' decoders do themselves."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in the order of their computation."""
        return (self.first, *self.middle, self.last)

    @property
    def in_channels(self) -> int:
        """Channels of what is given: raw latents, or pixels."""
        return self.first.conv.cin if self.first.pointwise is None else self.first.pointwise.cin

    @property
    def out_channels(self) -> int:
        """Channels of what is made: pixels, or the mean and the log variance of the latents."""
        return self.last.conv.cout if self.last.pointwise is None else self.last.pointwise.cout

    @property
    def full_channels(self) -> int:
        """Channels of the map at full resolution: a decoder's last one, an encoder's first."""
        return self.last.conv.cin if self.way == DECODE else self.first.conv.cout

    @property
    def scale(self) -> int:
        """Pixels per latent, each way."""
        return 1 << sum(isinstance(layer, (Upsample, Downsample)) for layer in self.middle)

    def wanted(self, index: int) -> Wanted:
        """What is wanted of the result of the layer of this index by the layer behind it, if there is one."""
        if index + 1 == len(self.layers):
            return Wanted(statistics=False, stored=True)
        following = self.layers[index + 1]
        return Wanted(statistics=following.wants_statistics, stored=not following.takes_recomputed)

    def sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """The height and width of what is given, and after that of every layer's result."""
        sizes = [size]
        for layer in self.layers:
            sizes.append(layer.size_after(sizes[-1]))
        return sizes

    def picture(self, size: tuple[int, int]) -> tuple[int, int]:
        """The height and width of the picture, in pixels, where what is given has this size."""
        return self.sizes(size)[-1] if self.way == DECODE else size


def read_network(vae: AutoencoderKL, way: Way = DECODE) -> Network:
    """Read one half of ``vae`` as it is now.

    Raises:
        InvalidOptionError: naming the module that is not supported, or what was done to one (`check_modules`).
    """
    from fluxvae.engine.module_state import check_modules  # here, because it brings PyTorch

    module = reading.unwrapped(getattr(vae, way.network, None))
    kind = next((one for one in _KINDS if any(reading.is_of(module, name) for name in one.networks[way])), None)
    if module is None or kind is None:
        reading.refuse("vae", vae, f"one of diffusers' VAEs with {'a' if way == DECODE else 'an'} {way.network}")
    check_modules(cast("torch.nn.Module", vae), way)
    try:
        return (_decoder if way == DECODE else _encoder)(kind, way, vae, module)
    except (AttributeError, IndexError, TypeError) as error:
        raise InvalidOptionError(
            f"engine: the exact engine cannot read vae.{way.network} ({type(module).__name__}): {error}. "
            "Use engine='diffusers' for this model."
        ) from error


def _down_block(name: str, module: Any) -> list[Layer]:
    block = reading.expect(name, module, "DownEncoderBlock2D")
    layers: list[Layer] = [Resnet.read(f"{name}.resnets.{j}", resnet) for j, resnet in enumerate(block.resnets)]
    return layers + [
        Downsample.read(f"{name}.downsamplers.{j}", downsampler)
        for j, downsampler in enumerate(block.downsamplers or ())
    ]


@dataclass(frozen=True)
class _Kind:
    """One kind of networks: the names of its blocks in diffusers, and what reads its layers."""

    networks: dict[Way, tuple[str, ...]]
    middle: tuple[str, ...]
    up: tuple[str, ...]
    conv_in: Callable[..., ConvIn]
    resnet: Callable[[str, Any], Layer]
    attention: Callable[[str, Any], Layer]
    upsample: Callable[[str, Any], Layer]
    down: Callable[[str, Any], list[Layer]]
    """Reads one of an encoder's ``down_blocks``: a block of layers, or a layer by itself."""
    conv_out: Callable[..., ConvOut]
    clamps: bool


_KINDS = (
    _Kind(
        {DECODE: ("Decoder",), ENCODE: ("Encoder",)},
        ("UNetMidBlock2D",), ("UpDecoderBlock2D",),
        ConvIn.read, Resnet.read, Attention.read, Upsample.read, _down_block, ConvOut.read, False,
    ),
    _Kind(
        {DECODE: causal.kinds("Decoder3d"), ENCODE: causal.kinds("Encoder3d")},
        causal.kinds("MidBlock"), causal.kinds("UpBlock"),
        causal.conv_in, causal.resnet, causal.attention, causal.upsample, causal.down_layer, causal.conv_out, True,
    ),
)  # fmt: skip


def _decoder(kind: _Kind, way: Way, vae: Any, decoder: Any) -> Network:
    layers: list[Layer] = list(_middle(kind, "decoder.mid_block", decoder.mid_block))
    for i, module in enumerate(decoder.up_blocks):
        name = f"decoder.up_blocks.{i}"
        block = reading.expect(name, module, *kind.up)
        layers += [kind.resnet(f"{name}.resnets.{j}", resnet) for j, resnet in enumerate(block.resnets)]
        layers += [
            kind.upsample(f"{name}.upsamplers.{j}", upsampler) for j, upsampler in enumerate(block.upsamplers or ())
        ]
    last = kind.conv_out("decoder", decoder)
    first = kind.conv_in("decoder.conv_in", decoder.conv_in, getattr(vae, way.pointwise, None))
    return Network(way, first, tuple(layers), last, kind.clamps)


def _encoder(kind: _Kind, way: Way, vae: Any, encoder: Any) -> Network:
    layers: list[Layer] = []
    for i, module in enumerate(encoder.down_blocks):
        layers += kind.down(f"encoder.down_blocks.{i}", module)
    layers += _middle(kind, "encoder.mid_block", encoder.mid_block)
    last = kind.conv_out("encoder", encoder, getattr(vae, way.pointwise, None))
    return Network(way, kind.conv_in("encoder.conv_in", encoder.conv_in), *precise(layers, last))


def precise(layers: list[Layer], last: ConvOut) -> tuple[tuple[Layer, ...], ConvOut]:
    """Mark the convolutions of an encoder as precise, except for the levels whose errors hardly reach the latents.

    Those are narrow levels at the beginning. Two or more downsamplings average what is rounded there, and four times as
    many channels behind them round more: with FLUX's widths, Winograd's F(6, 3) at the first level alone makes the
    error of the whole 4 % larger than PyTorch's, and at the third three times as large.
    """
    halvings = [index for index, layer in enumerate(layers) if isinstance(layer, Downsample)]
    start = halvings[-2] + 1 if len(halvings) > 1 else 0
    narrow = last.conv.cin // 4
    marked = (
        layer if index < start and isinstance(layer, Resnet) and layer.conv2.cout <= narrow else made_precise(layer)
        for index, layer in enumerate(layers)
    )
    return tuple(marked), made_precise(last)


def _middle(kind: _Kind, name: str, module: Any) -> Iterator[Layer]:
    block = reading.expect(name, module, *kind.middle)
    yield kind.resnet(f"{name}.resnets.0", block.resnets[0])
    for i, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=False)):
        if attention is not None:
            yield kind.attention(f"{name}.attentions.{i}", attention)
        yield kind.resnet(f"{name}.resnets.{i + 1}", resnet)
