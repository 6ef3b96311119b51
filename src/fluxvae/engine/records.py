"""A VAE's decoder as a flat tuple of small records. No torch in here.

A record refers to the model's own modules (nothing is copied, so a model that moves between devices or dtypes stays
in step) and says in plain integers what the planner needs. `network` reads them off a model; `checkpoints.outline`
makes them from a config, without modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Attention", "Conv", "Layer", "Network", "Norm", "Resnet", "Upsample", "parameters"]


@dataclass(frozen=True)
class Conv:
    """A convolution of stride 1, 3x3 with one zero of padding or 1x1, or a linear layer over pixels."""

    name: str
    cin: int
    cout: int
    kernel: int
    module: nn.Module
    """Holds ``weight`` (cout, cin[, kernel, kernel]) and ``bias`` (cout,) or None; read when used."""

    @property
    def weights(self) -> int:
        """Number of values in the weight."""
        return self.cin * self.cout * self.kernel * self.kernel


@dataclass(frozen=True)
class Norm:
    """A GroupNorm over the whole image."""

    name: str
    channels: int
    groups: int
    eps: float
    learned: bool
    """Has a weight and a bias."""
    module: nn.Module


@dataclass(frozen=True)
class Resnet:
    """``x -> (shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))) / scale``."""

    name: str
    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None
    scale: float


@dataclass(frozen=True)
class Attention:
    """Self-attention of one head over all pixels: ``x -> (out(attend(norm(x))) + x) / scale``."""

    name: str
    norm: Norm
    q: Conv
    k: Conv
    v: Conv
    out: Conv
    softmax_scale: float
    residual: bool
    scale: float


@dataclass(frozen=True)
class Upsample:
    """Nearest 2x enlargement, then a 3x3 convolution."""

    name: str
    conv: Conv


Layer: TypeAlias = Resnet | Attention | Upsample


@dataclass(frozen=True)
class Network:
    """A whole decoder, in the order it runs: raw latents in, pixels out."""

    latent_channels: int
    out_channels: int
    scale: int
    """Pixels per latent, in each direction."""
    post_quant: Conv | None
    conv_in: Conv
    layers: tuple[Layer, ...]
    norm_out: Norm
    conv_out: Conv


def parameters(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a convolution or a linear layer, as they are now (a module may have moved)."""
    weight, bias = module.weight, module.bias
    return cast("torch.Tensor", weight).detach(), None if bias is None else cast("torch.Tensor", bias).detach()
