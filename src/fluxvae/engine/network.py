"""Reads the decoder of any diffusers ``AutoencoderKL`` as a row of layers. Only this module lists the kinds of layers.

Read from diffusers 0.42.1: ``autoencoders/vae.py`` (Decoder) and ``unets/unet_2d_blocks.py`` (UNetMidBlock2D,
UpDecoderBlock2D). What is inside these blocks, each kind of layer reads for itself. Importing this module does not
import PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from fluxvae.engine.layers import Layer, reading
from fluxvae.engine.layers.attention import Attention
from fluxvae.engine.layers.conv_in import ConvIn
from fluxvae.engine.layers.conv_out import ConvOut
from fluxvae.engine.layers.resnet import Resnet
from fluxvae.engine.layers.upsample import Upsample
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

__all__ = ["Network", "read_network"]


@dataclass(frozen=True)
class Network:
    """A decoder in the order of its computation. The names are diffusers'."""

    first: ConvIn
    middle: tuple[Layer, ...]
    last: ConvOut

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in the order of their computation."""
        return (self.first, *self.middle, self.last)

    @property
    def latent_channels(self) -> int:
        """Channels of the raw latents."""
        return self.first.conv.cin

    @property
    def latents_held(self) -> int:
        """How many tensors as large as the latents the first layer makes; two where it has a 1x1 convolution."""
        return 1 if self.first.pointwise is None else 2

    @property
    def last_channels(self) -> int:
        """Channels of the last map before the image."""
        return self.last.conv.cin

    @property
    def out_channels(self) -> int:
        """Channels of the image."""
        return self.last.conv.cout

    @property
    def scale(self) -> int:
        """Pixels per latent, each way."""
        return math.prod(layer.enlarges for layer in self.layers)


def read_network(vae: AutoencoderKL) -> Network:
    """Read ``vae``'s decoder as it is now.

    Raises:
        InvalidOptionError: naming the module that is not supported, or what was done to one (`check_modules`).
    """
    from fluxvae.engine.module_state import check_modules  # here, because it brings PyTorch

    decoder = reading.unwrapped(getattr(vae, "decoder", None))
    if decoder is None or not hasattr(decoder, "up_blocks"):
        reading.refuse("vae", vae, "a diffusers AutoencoderKL with a decoder")
    check_modules(cast("torch.nn.Module", vae))
    try:
        return _read(vae, decoder)
    except (AttributeError, IndexError, TypeError) as error:
        raise InvalidOptionError(
            f"engine: the exact engine cannot read vae.decoder ({type(decoder).__name__}): {error}. "
            "Use engine='diffusers' for this model."
        ) from error


def _read(vae: Any, decoder: Any) -> Network:
    reading.expect("decoder", decoder, "Decoder")
    layers: list[Layer] = []
    mid = reading.expect("decoder.mid_block", decoder.mid_block, "UNetMidBlock2D")
    layers.append(Resnet.read("decoder.mid_block.resnets.0", mid.resnets[0]))
    for i, (attention, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=False)):
        if attention is not None:
            layers.append(Attention.read(f"decoder.mid_block.attentions.{i}", attention))
        layers.append(Resnet.read(f"decoder.mid_block.resnets.{i + 1}", resnet))
    for i, module in enumerate(decoder.up_blocks):
        name = f"decoder.up_blocks.{i}"
        block = reading.expect(name, module, "UpDecoderBlock2D")
        layers += [Resnet.read(f"{name}.resnets.{j}", resnet) for j, resnet in enumerate(block.resnets)]
        layers += [
            Upsample.read(f"{name}.upsamplers.{j}", upsampler) for j, upsampler in enumerate(block.upsamplers or ())
        ]
    last = ConvOut.read(decoder)
    if any(layer.enlarges > 1 and not following.takes_recomputed for layer, following in pairwise([*layers, last])):
        reading.refuse("decoder.up_blocks", decoder.up_blocks, "a resnet after every upsampler")
    return Network(ConvIn.read(vae, decoder), tuple(layers), last)
