"""Small seeded networks of many shapes for the exact engine's tests, and their oracle: diffusers in float64.

A shape has a size in latents. `pixels` makes pictures of that many latents, and of some pixels more where asked.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import strategies as st

from fluxvae.devices import computes_directly
from fluxvae.engine.kernels.cpu import vector_code
from fluxvae.verify.tolerances import ENGINE_ERROR_RATIO


@dataclass(frozen=True)
class Shape:
    """An architecture and the size of one decode."""

    widths: tuple[int, ...] = (16, 32, 32)
    groups: int = 4
    layers_per_block: int = 1
    latent_channels: int = 4
    post_quant: bool = False
    attention: bool = True
    height: int = 6
    width: int = 5
    batch: int = 1
    seed: int = 0

    def vae(self, dtype: torch.dtype = torch.float32, *, encoder: bool = False) -> AutoencoderKL:
        """The network, with the half that is asked for alone: an engine never looks at the other."""
        torch.manual_seed(self.seed)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * len(self.widths),
            up_block_types=("UpDecoderBlock2D",) * len(self.widths),
            block_out_channels=self.widths,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.groups,
            use_quant_conv=encoder and self.post_quant,
            use_post_quant_conv=self.post_quant,
            mid_block_add_attention=self.attention,
        )
        for half in ("decoder", "post_quant_conv") if encoder else ("encoder",):
            setattr(vae, half, None)
        with torch.no_grad():
            for module in vae.modules():
                if isinstance(module, torch.nn.GroupNorm):  # not the identity that a fresh one is
                    module.weight.normal_(1.0, 0.3)
                    module.bias.normal_(0.0, 0.3)
        torch.nn.Module.to(vae, dtype)  # diffusers' own to() logs a warning that is beside the point here
        return vae.eval().requires_grad_(False)

    def latents(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.latent_channels, self.height, self.width)
        return torch.randn(shape, generator=generator).to(dtype)

    @property
    def scale(self) -> int:
        return 2 ** (len(self.widths) - 1)

    def pixels(self, dtype: torch.dtype = torch.float32, more: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """(batch, 3, height, width) in [-1, 1], with ``more`` rows and columns than whole latents have."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        height, width = (self.scale * side + extra for side, extra in zip((self.height, self.width), more, strict=True))
        return (2 * torch.rand((self.batch, 3, height, width), generator=generator) - 1).to(dtype)


def true_encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """diffusers' moments of the very same weights and pixels in float64: mean and log variance, not clamped."""
    with torch.no_grad():
        return torch.nn.Module.to(copy.deepcopy(vae), torch.float64).encode(pixels.double()).latent_dist.parameters


def true_decode(vae: AutoencoderKL, raw: torch.Tensor) -> torch.Tensor:
    """diffusers' decode of the very same weights and latents in float64."""
    with torch.no_grad():
        return torch.nn.Module.to(copy.deepcopy(vae), torch.float64).decode(raw.double()).sample


def error_ratio(dtype: str) -> float:
    """The bound for small maps: PyTorch leaves oneDNN for those where that has no AVX-512 code, the engine does not."""
    avx512 = computes_directly(torch.bfloat16, torch.device("cpu"))
    small = "float32 in small maps without AVX-512"
    return ENGINE_ERROR_RATIO[dtype if avx512 or dtype != "float32" else small].bound


needs_vector_code = pytest.mark.skipif(vector_code.supported() is not None, reason=str(vector_code.supported()))
"""For what calls the compiled CPU kernels: they run on every x86-64 with AVX2, and on Arm."""


@pytest.fixture
def one_thread(threads_kept: None) -> None:
    """Tiny operations on a busy machine wait for each other's threads longer than they compute."""
    torch.set_num_threads(1)


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    levels = draw(st.integers(1, 4))
    # Two channels in a group at least: PyTorch refuses a group of a single value.
    widths = tuple(groups * draw(st.integers(2, 24 // groups)) for _ in range(levels))
    kind = draw(st.sampled_from(["small", "row", "column", "oblong"]))
    small = st.integers(1, 7)
    height, width = {
        "small": (draw(small), draw(small)),
        "row": (1, draw(st.integers(1, 24))),
        "column": (draw(st.integers(1, 24)), 1),
        "oblong": (draw(st.integers(1, 2)), draw(st.integers(8, 24))),
    }[kind]
    return Shape(
        widths=widths,
        groups=groups,
        layers_per_block=draw(st.integers(1, 2)),
        latent_channels=draw(st.sampled_from([1, 4, 16])),
        post_quant=draw(st.booleans()),
        attention=draw(st.booleans()),
        height=height,
        width=width,
        batch=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 99)),
    )
