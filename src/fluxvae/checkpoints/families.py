"""Families: which model a VAE belongs to, which decides what no tensor says, above all the factors of its latents.

The VAEs of several models have the same tensors in the same shapes and differ only in their factors, which a single
file does not hold. If the file also holds the model's transformer or UNet, that shows which model it is. Otherwise the
likeliest family is assumed and the caller is warned; ``family=``, or the factors themselves, settle it.

Sources: the config.json of each model's VAE on the hub; ComfyUI's ``latent_formats.py`` for Playground's statistics;
``ErnieImagePipeline``, which computes with an eps of 1e-5 whatever its config says; the defaults of diffusers'
``AutoencoderKLQwenImage`` and ``AutoencoderKLWan``, which are the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fluxvae.checkpoints.entries import Entry
from fluxvae.errors import CheckpointError, InvalidOptionError
from fluxvae.latents.reading import is_finite_number

__all__ = [
    "FACTORS",
    "FAMILIES",
    "Choice",
    "Family",
    "check_factors",
    "choose_family",
    "known_family",
    "told_by_neighbours",
    "wanted_factor",
]


_SCALE_AND_SHIFT = ("scaling_factor", "shift_factor")
FACTORS: dict[str, tuple[str, ...]] = {
    "AutoencoderKL": _SCALE_AND_SHIFT,
    "AutoencoderTiny": _SCALE_AND_SHIFT,
    "AutoencoderKLFlux2": ("batch_norm_eps",),
    "AutoencoderKLQwenImage": (),
    "AutoencoderKLWan": (),
}
"""For each of diffusers' classes the factors of its latents that a caller may give. The last two have a mean and a
deviation for each channel instead."""


@dataclass(frozen=True)
class Family:
    """A model, or several that share one VAE, with the part of the VAE's config that its tensors do not show."""

    name: str
    models: str
    """The models of this family, in words, for messages."""
    channels: int
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    batch_norm_eps: float | None = None
    """Only FLUX.2's class has this; it normalises its latents by statistics and has no factors."""
    levels: int | None = 4
    """How many levels the decoder has."""
    post_quant_conv: bool = True
    sample_size: int = 1024
    classes: tuple[str, ...] = ("AutoencoderKL",)
    """diffusers' classes for this VAE. Where there are several, they compute the same for one image."""
    preview: bool = True
    """Whether there are previews (``AutoencoderTiny``) that only this family can tell the use of. ERNIE's would be
    FLUX.2's, because a preview uses no eps; those of Qwen-Image are networks of another kind."""

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the config.json of the full VAE would hold besides those that the shapes show."""
        if self.batch_norm_eps is not None:
            return {"batch_norm_eps": self.batch_norm_eps, "sample_size": self.sample_size}
        if self.scaling_factor is None:
            return {"latents_mean": self.latents_mean, "latents_std": self.latents_std}
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": self.latents_mean,
            "latents_std": self.latents_std,
            "sample_size": self.sample_size,
        }

    @property
    def formula(self) -> str:
        """The factors of this family's latents, in words, for messages."""
        if self.batch_norm_eps is not None:
            return f"batch_norm_eps {self.batch_norm_eps:g}"
        if self.scaling_factor is None:
            return "latents_mean and latents_std"
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
        Family("flux2", "FLUX.2, FLUX.3 and others", 32, batch_norm_eps=1e-4, classes=("AutoencoderKLFlux2",)),
        Family("ernie", "ERNIE-Image", 32, batch_norm_eps=1e-5, classes=("AutoencoderKLFlux2",), preview=False),
        Family(
            "qwen-image", "Qwen-Image, Krea 2, NucleusMoE-Image, Anima, Wan 2.1 and others", 16,
            latents_mean=(
                -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
            ),
            latents_std=(
                2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
            ),
            classes=("AutoencoderKLQwenImage", "AutoencoderKLWan"), preview=False,
        ),
    )
}  # fmt: skip
"""All families by name. The order matters: of those that fit a file, the first is the one that is assumed."""


@dataclass(frozen=True)
class Choice:
    """The family that was chosen for a single file, and what the choice rests on."""

    family: Family | None
    """None where the caller gave all the factors: then it does not matter which family the VAE belongs to, if any."""
    told_by: Literal["shapes", "neighbours", "family", "factors", "assumed"]
    others: tuple[Family, ...] = ()
    """The other families that would fit as well, where one was assumed."""


def known_family(name: str) -> Family:
    """Return the family of this name.

    Raises:
        InvalidOptionError: no family has this name.
    """
    if name not in FAMILIES:
        raise InvalidOptionError(f"family: got {name!r}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def check_factors(factors: Mapping[str, float | None]) -> dict[str, float]:
    """Return those of ``scaling_factor``, ``shift_factor`` and ``batch_norm_eps`` that the caller gave, as floats.

    Raises:
        InvalidOptionError: a factor is not a finite number, the scaling factor is 0, or the eps is negative.
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
    """Return in words what a factor of this name must be, if ``value`` is not that; otherwise an empty text."""
    if not is_finite_number(value):
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
    factors: tuple[str, ...],
    where: str,
    is_: str,
) -> Choice:
    """Decide whose VAE a single file holds.

    Args:
        fits: the families whose VAE has these tensors, the likeliest first.
        told: the name of the family that the other tensors in the file belong to (`told_by_neighbours`), if known.
        family: the family that the caller named, if any.
        given: the factors that the caller gave.
        factors: the factors that the VAE's class has a place for (`FACTORS`), the decisive one first.
        where, is_: the file, and its tensors described in words, for messages.

    Raises:
        InvalidOptionError: the family that the caller named does not fit the file.
        CheckpointError: no family fits, and the caller gave no factors either.
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
        if factors and factors[0] in given:
            return Choice(None, "factors")
        give = f"give {factors[0]}=" if factors else "load its diffusers folder, whose config.json has them"
        if factors == _SCALE_AND_SHIFT:
            give += " (and shift_factor=, if it has one)"
        raise CheckpointError(
            f"checkpoint: {where} is {is_}, which fits no model that is known here; a single file does not hold the "
            f"{'factors' if factors else 'mean and deviation'} of its latents: {give}"
            + (", or load its diffusers folder" if factors else "")
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
    """Return the name of the family that the transformer or UNet in the same file belongs to.

    Returns:
        None where the file holds no such model, or none that is known here.
    """
    if any(name.rpartition(".")[2] == "edm_mean" for name in entries):
        return "playground-v2.5"
    for name, entry in entries.items():
        for family, pattern in _NEIGHBOURS:
            if pattern.match(name):
                return family
        # A UNet's cross-attention reads the text encoder's features, whose width differs between the families: 768 from
        # CLIP (SD 1), 1024 from OpenCLIP (SD 2), and 2048 where SDXL puts the features of its two encoders together.
        if name.endswith(".attn2.to_k.weight") and len(entry.shape) == 2:
            return {768: "sd", 1024: "sd", 2048: "sdxl"}.get(entry.shape[1])
    return None
