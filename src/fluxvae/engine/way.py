"""The two ways through a VAE: from latents to pixels, and from pixels to latents. PyTorch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DECODE", "ENCODE", "Way"]


@dataclass(frozen=True)
class Way:
    """One of the two ways, with the words that messages have for it."""

    name: Literal["decode", "encode"]
    """The method of diffusers' VAE that goes this way."""
    doing: str
    given: str
    """What goes in: ``"latents"`` or ``"images"``."""
    made: str
    """What comes out: ``"pixels"`` or ``"latents"``."""
    network: Literal["decoder", "encoder"]
    """The module that has the network's layers."""
    pointwise: Literal["post_quant_conv", "quant_conv"]
    """The 1x1 convolution that some models have on the latents' side of the network."""

    @property
    def parts(self) -> tuple[str, str]:
        """The names of the modules that are used on this way."""
        return self.pointwise, self.network


DECODE = Way("decode", "decoding", "latents", "pixels", "decoder", "post_quant_conv")
ENCODE = Way("encode", "encoding", "images", "latents", "encoder", "quant_conv")
