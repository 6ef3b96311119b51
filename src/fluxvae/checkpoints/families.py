"""Whose VAE it is: what no tensor of a single file says, above all the factors of its latents.

Several models' VAEs have the same tensors in the same shapes and other factors. Where the file does not tell which it
is, one is assumed, the caller is warned, and ``family=`` or the factors themselves say it. A transformer or UNet in the
same file tells.

Sources: the config.json of each model's VAE on the hub; ComfyUI's ``latent_formats.py`` for Playground's statistics;
``ErnieImagePipeline``, which computes with an eps of 1e-5 whatever its config says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fluxvae.checkpoints.entries import Entry
from fluxvae.errors import CheckpointError, InvalidOptionError

__all__ = [
    "FAMILIES",
    "Choice",
    "Family",
    "check_factors",
    "choose_family",
    "known_family",
    "told_by_neighbours",
    "wanted_factor",
]


@dataclass(frozen=True)
class Family:
    """A model, or several that share one VAE, and the part of the VAE's config that its tensors do not say."""

    name: str
    models: str
    """For people."""
    channels: int
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    batch_norm_eps: float | None = None
    """Of FLUX.2's class only, which has no factors."""
    levels: int | None = 4
    """Of the decoder."""
    post_quant_conv: bool = True
    sample_size: int = 1024

    @property
    def config(self) -> dict[str, Any]:
        """What a config.json of the full VAE would say."""
        if self.batch_norm_eps is not None:
            return {"batch_norm_eps": self.batch_norm_eps, "sample_size": self.sample_size}
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": self.latents_mean,
            "latents_std": self.latents_std,
            "sample_size": self.sample_size,
        }

    @property
    def formula(self) -> str:
        """Its factors, in words."""
        if self.batch_norm_eps is not None:
            return f"batch_norm_eps {self.batch_norm_eps:g}"
        shift = f", shift_factor {self.shift_factor}" if self.shift_factor is not None else ""
        mean = ", latents_mean and latents_std" if self.latents_mean is not None else ""
        return f"scaling_factor {self.scaling_factor}{shift}{mean}"


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "flux1", "FLUX.1, Chroma, Z-Image, Lumina 2, HiDream and others", 16, 0.3611, 0.1159, post_quant_conv=False
        ),
        Family("sd3", "Stable Diffusion 3 and 3.5", 16, 1.5305, 0.0609, post_quant_conv=False),
        Family("sd", "Stable Diffusion 1 and 2", 4, 0.18215, sample_size=512),
        Family("sdxl", "Stable Diffusion XL, Kolors, AuraFlow, PixArt Sigma and others", 4, 0.13025),
        Family(
            "playground-v2.5", "Playground 2.5", 4, 0.5,
            latents_mean=(-1.6574, 1.886, -1.383, 2.5155), latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
        ),
        Family("sd-x4-upscaler", "Stable Diffusion's x4 upscaler", 4, 0.08333, levels=3, sample_size=256),
        Family("flux2", "FLUX.2, FLUX.3 and others", 32, batch_norm_eps=1e-4),
        Family("ernie", "ERNIE-Image", 32, batch_norm_eps=1e-5),
    )
}  # fmt: skip
"""Of those that fit a file, the first is assumed."""


@dataclass(frozen=True)
class Choice:
    """What was found out of a file's family."""

    family: Family | None
    """None: the caller gave the factors of a VAE that is no family's."""
    told_by: Literal["shapes", "neighbours", "family", "factors", "assumed"]
    others: tuple[Family, ...] = ()
    """That would fit as well, where one was assumed."""


def known_family(name: str) -> Family:
    """The family of this name.

    Raises:
        InvalidOptionError: there is none.
    """
    if name not in FAMILIES:
        raise InvalidOptionError(f"family: got {name!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def check_factors(factors: Mapping[str, float | None]) -> dict[str, float]:
    """Those of ``scaling_factor``, ``shift_factor`` and ``batch_norm_eps`` that were given.

    Raises:
        InvalidOptionError: not a finite number, a scaling factor of 0, a negative eps.
    """
    given: dict[str, float] = {}
    for name, value in factors.items():
        if value is None:
            continue
        if wanted := wanted_factor(name, value):
            raise InvalidOptionError(f"{name}: got {value!r}, expected {wanted}")
        given[name] = float(value)
    return given


def wanted_factor(name: str, value: object) -> str:
    """What a factor of this name has to be, where ``value`` is not it; else nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "a finite number"
    if name == "scaling_factor" and value == 0:
        return "a number other than 0"
    return "a number that is not negative" if name == "batch_norm_eps" and value < 0 else ""


def choose_family(
    fits: list[Family],
    told: str | None,
    family: Family | None,
    given: Mapping[str, float],
    *,
    batch_norm: bool,
    where: str,
    is_: str,
) -> Choice:
    """Decide whose VAE a single file holds.

    Args:
        fits: families whose VAE has these tensors.
        told: name of the family of what else is in the file (`told_by_neighbours`).
        family: the one the caller named.
        given: the factors the caller gave.
        batch_norm: its class has `Family.batch_norm_eps` in the place of factors.
        where, is_: the file and what its tensors are, for messages.

    Raises:
        InvalidOptionError: the family that was named does not fit.
        CheckpointError: none fits, and no factors were given.
    """
    if told is not None and any(one.name == told for one in fits):
        fits = [one for one in fits if one.name == told]
        by: Literal["shapes", "neighbours"] = "neighbours"
    else:
        by = "shapes"
    if family is not None:
        if family not in fits:
            fitting = ", ".join(one.name for one in fits) or "none that is known here"
            beside = " by what else is in the file" if by == "neighbours" else ""
            raise InvalidOptionError(
                f"family: got {family.name!r} for {where}, whose tensors are {is_}; the families that fit{beside}: "
                f"{fitting}"
            )
        return Choice(family, "family")
    if not fits:
        if ("batch_norm_eps" if batch_norm else "scaling_factor") in given:
            return Choice(None, "factors")
        factors = "batch_norm_eps=" if batch_norm else "scaling_factor= (and shift_factor=, if it has one)"
        raise CheckpointError(
            f"checkpoint: {where} is {is_}, as no model's that is known here; a single file does not hold the factors "
            f"of its latents: give {factors}, or load its diffusers folder"
        )
    first, *others = fits
    if not others:
        return Choice(first, by)
    settled = {"batch_norm_eps"} if first.batch_norm_eps is not None else {"scaling_factor"}
    if first.shift_factor is not None:
        settled.add("shift_factor")
    if settled <= given.keys():
        return Choice(None, "factors")
    return Choice(first, "assumed", tuple(others))


_NEIGHBOURS = (
    ("flux2", re.compile(r".*double_stream_modulation_img\.")),
    ("sd3", re.compile(r".*joint_blocks\.\d+\.")),
    ("flux1", re.compile(r".*double_blocks\.\d+\.img_")),
)


def told_by_neighbours(entries: Mapping[str, Entry]) -> str | None:
    """The family that the transformer or UNet in the same file belongs to; None: there is none that is known."""
    if any(name.rpartition(".")[2] == "edm_mean" for name in entries):
        return "playground-v2.5"
    for name, entry in entries.items():
        for family, pattern in _NEIGHBOURS:
            if pattern.match(name):
                return family
        # The width of what its attention reads: CLIP's, OpenCLIP's, or both of SDXL's.
        if name.endswith(".attn2.to_k.weight") and len(entry.shape) == 2:
            return {768: "sd", 1024: "sd", 2048: "sdxl"}.get(entry.shape[1])
    return None
