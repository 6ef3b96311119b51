"""Latents as other programs keep them: ComfyUI's files and the caches of trainers, each known by its header.

Every program has one small function here that looks at what a file holds, by name, and says which of its tensors are
pictures and what is known of them; or None: it is not that program's. `docs/latent-files.md` says the same in a table,
with the place in each program's source. What a file does not tell is asked for (`Picture.ask`), never guessed.
SimpleTuner's have no function: a tensor alone in a ``.pt``, scaled, is what any such tensor is taken for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxvae.batch.readings import Expected
from fluxvae.batch.tensors import Lazy
from fluxvae.latents.format import LatentFormat

__all__ = ["Contents", "Picture", "pictures_of"]


@dataclass(frozen=True)
class Contents:
    """What a file's header tells."""

    name: str
    """Of the file."""
    tensors: Mapping[str, Lazy]
    """By name; the name is ``""`` where the file is one tensor and has none."""
    values: Mapping[str, Any]
    """Metadata of safetensors, which are texts; other values of a ``.pt``."""
    parts: tuple[Mapping[str, Any], ...] = ()
    """A ``.pt`` that is a list of dictionaries."""

    @property
    def suffix(self) -> str:
        """``"pt"``."""
        return self.name.rpartition(".")[2].lower()


@dataclass(frozen=True)
class Picture:
    """One tensor of a file that is latents."""

    tensor: Lazy
    one: bool = False
    """It is one image without a batch axis, (C, h, w) or (C, frames, h, w), whatever its shape could also be."""
    label: str = ""
    """What tells it from the others of its file, for the output's name."""
    height: object = None
    width: object = None
    raw: object = None
    ids: Lazy | None = None
    ask: str | None = None
    """Why the file alone does not say whether they are raw; the caller has to."""


def pictures_of(held: Contents, expected: Expected) -> list[Picture] | None:
    """The pictures of a file that another program wrote; empty: it holds none, such as a text encoder's cache.

    Args:
        expected: what the job takes its inputs for; above all the checkpoint they are to be decoded with.

    Returns:
        None: no program's that is known here.
    """
    for layout in _LAYOUTS:
        if (found := layout(held, expected)) is not None:
            return found
    return None


# -- what latents were made for ----------------------------------------------------------------------------------------

_FLUX1, _SD3, _SDXL, _SD = ("FLUX.1", 16, 0.3611), ("SD3", 16, 1.5305), ("SDXL", 4, 0.13025), ("SD", 4, 0.18215)
_FLUX2 = ("FLUX.2", 32, 1.0)
_Space = tuple[str, int, float]


def _ask(space: _Space | None, program: str, said: str, format: LatentFormat) -> str | None:
    """Why latents scaled for one model are not simply another's: they may have the same shape and other factors."""
    if space is None:
        return f"{program} made it for {said!r}, of which fluxvae does not know whether it is raw or scaled"
    name, channels, factor = space
    if channels == format.channels and not format.preview and factor != format.scaling_factor:
        return (
            f"{program} scaled it for {name} (scaling_factor {factor}), and this checkpoint's scaling_factor is "
            f"{format.scaling_factor}: use that model's VAE, or say what it is in spite of that"
        )
    return None


# -- ComfyUI -----------------------------------------------------------------------------------------------------------


def _comfyui(held: Contents, expected: Expected) -> list[Picture] | None:
    """``nodes.py``, SaveLatent and LoadLatent. A LATENT is what ComfyUI's VAE decodes: raw, and of FLUX.2 normalised
    patches, since its VAE does the statistics itself."""
    if "latent_tensor" not in held.tensors:
        return None
    tensor, format = held.tensors["latent_tensor"], expected.format
    channels = tensor.shape[1] if len(tensor.shape) > 3 else 0
    if "latent_format_version_0" not in held.tensors:  # before May 2023: LoadLatent multiplies by 1 / 0.18215
        if format.channels == _SD[1] and format.scaling_factor == _SD[2]:
            return [Picture(tensor, raw=False)]
        return [Picture(tensor, ask="it has no latent_format_version_0, as ComfyUI wrote files of SD before May 2023")]
    if format.flux2 and channels == format.channels:
        return [Picture(tensor, ask=f"ComfyUI's latents of FLUX.2 have {4 * format.channels} channels")]
    return [Picture(tensor, raw=not (format.flux2 and channels == 4 * format.channels))]


# -- kohya-ss: sd-scripts and musubi-tuner -----------------------------------------------------------------------------

_KOHYA = re.compile(
    r"latents(?:_(?P<kind>flipped|control|image|clean|clean_2x|clean_4x)(?:_(?P<number>\d+))?)?"
    r"(?:_(?:(?P<frames>\d+)x)?(?P<size>\d+x\d+))?(?:_(?P<dtype>[a-z]+\d+\w*))?"
)
_SD_SCRIPTS: dict[str, _Space] = {"flux": _FLUX1}
_MUSUBI: dict[str, _Space] = {
    "flux_kontext": _FLUX1,
    "flux_2_dev": _FLUX2,
    "flux_2_klein_4b": _FLUX2,
    "flux_2_klein_9b": _FLUX2,
}


def _sd_scripts(held: Contents, expected: Expected) -> list[Picture] | None:
    """``library/strategy_base.py``, ``save_latents_to_disk``: ``*_flux.npz``."""
    if held.suffix != "npz" or not any(name.startswith(("original_size", "crop_ltrb")) for name in held.tensors):
        return None
    model = held.name[: -len(".npz")].rpartition("_")[2]
    return _kohya(held, expected.format, "sd-scripts", model, _SD_SCRIPTS.get(model))


def _kohya_safetensors(held: Contents, expected: Expected) -> list[Picture] | None:
    """``cache_io.py`` of musubi-tuner, and sd-scripts' branch ``new_cache``. Their metadata's ``height`` and ``width``
    are the original picture's: the latents have the bucket's size."""
    if "architecture" not in held.values or "format_version" not in held.values:
        return None
    model, format = str(held.values["architecture"]), expected.format
    if model == "z_image":  # cached as the VAE gives them; scaled when trained
        return [Picture(each.tensor, True, each.label, raw=True) for each in _kohya(held, format, "", model, _FLUX1)]
    known = _MUSUBI | _SD_SCRIPTS
    return _kohya(held, format, "sd-scripts" if model in _SD_SCRIPTS else "musubi-tuner", model, known.get(model))


def _kohya(held: Contents, format: LatentFormat, program: str, model: str, space: _Space | None) -> list[Picture]:
    found = {name: match for name in held.tensors if (match := _KOHYA.fullmatch(name))}
    ask = _ask(space, program, model, format)
    sizes = {(match["size"], match["dtype"]) for match in found.values() if match["kind"] in (None, "flipped")}
    pictures = []
    for name, match in found.items():
        parts = [match["size"], match["dtype"]] if len(sizes) > 1 and match["kind"] in (None, "flipped") else []
        parts += [match["kind"], match["number"]]
        label = "_".join(part for part in parts if part)
        pictures.append(Picture(held.tensors[name], True, label, raw=None if ask else False, ask=ask))
    return pictures


# -- other trainers ----------------------------------------------------------------------------------------------------

_AI_TOOLKIT: dict[str, _Space] = {
    "flux1": _FLUX1,
    "flux_kontext": _FLUX1,
    "chroma": _FLUX1,
    "hidream": _FLUX1,
    "hidream_e1": _FLUX1,
    "zimage": _FLUX1,
    "flux2": _FLUX2,
    "flux2_klein_4b": _FLUX2,
    "flux2_klein_9b": _FLUX2,
    "sd3": _SD3,
    "sdxl": _SDXL,
    "sd1": _SD,
}


def _ai_toolkit(held: Contents, expected: Expected) -> list[Picture] | None:
    """``toolkit/dataloader_mixins.py``, ``_cache_one_latent``; always scaled, of FLUX.2 normalised patches."""
    if "latent" not in held.tensors or "latent_space_version" not in held.values:
        return None
    said = str(held.values["latent_space_version"])
    ask = _ask(_AI_TOOLKIT.get(said), "ai-toolkit", said, expected.format)
    names = {"latent": "", "first_frame_latent": "first_frame"}
    return [
        Picture(held.tensors[name], True, label, raw=None if ask else False, ask=ask)
        for name, label in names.items()
        if name in held.tensors
    ]


def _onetrainer(held: Contents, expected: Expected) -> list[Picture] | None:
    """mgds' ``DiskCache`` with the names of ``FluxBaseDataLoader`` and ``Flux2BaseDataLoader``: the mean as the VAE
    gives it, raw; it is scaled when it is used."""
    if "latent_image" not in held.tensors:
        return None
    names = {"latent_image": "", "latent_conditioning_image": "conditioning"}
    return [Picture(held.tensors[name], True, label, raw=True) for name, label in names.items() if name in held.tensors]


_TEXTS = ("t5_out", "text_embed", "text_embed_0", "prompt_embeds", "tokens", "tokens_1", "text_encoder_hidden_state")


def _texts(held: Contents, expected: Expected) -> list[Picture] | None:
    """What trainers keep beside latents: what text encoders gave, and OneTrainer's ``aggregate.pt``."""
    named = held.tensors.keys() | held.values.keys()
    if any(name.startswith("latent") for name in held.tensors):
        return None
    known = any(name in named for name in _TEXTS) or {"architecture", "caption1"} <= held.values.keys()
    return [] if known or (held.parts and all("image_path" in part for part in held.parts)) else None


_LAYOUTS: tuple[Callable[[Contents, Expected], list[Picture] | None], ...] = (
    _comfyui,
    _sd_scripts,
    _kohya_safetensors,
    _ai_toolkit,
    _onetrainer,
    _texts,
)
