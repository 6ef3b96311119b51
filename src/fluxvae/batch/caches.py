"""Recognises latents that other programs wrote: ComfyUI's files and the caches of trainers.

Every program has one small function here. It looks at the names of what a file holds, and returns the tensors that are
latents of pictures, with what the file tells of them; or None where the program did not write the file.
`docs/latent-files.md` has the same in a table, with the place in each program's source. What a file does not tell, the
user has to say (`Picture.ask`): nothing is guessed. SimpleTuner needs no function, because its files are a single
tensor of scaled latents in a ``.pt``, and that is how such a file is read anyway.

*Scaled* latents are what a transformer leaves, *raw* ones what the VAE decodes. *Normalised patches* are FLUX.2's
scaled latents in 2x2 patches: 128 channels at half the height and width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fluxvae.batch.readings import Expected
from fluxvae.batch.tensors import Lazy
from fluxvae.latents.format import LatentFormat

__all__ = ["Contents", "Picture", "pictures_of"]


@dataclass(frozen=True)
class Contents:
    """What a file holds, as its header tells it."""

    name: str
    """The file's name, without its folder."""
    tensors: Mapping[str, Lazy]
    """The tensors by name. The name is ``""`` where the file is a single tensor, which has none."""
    values: Mapping[str, Any]
    """What is not a tensor, by name: the metadata of safetensors, which are texts, or the other values of a ``.pt``."""
    parts: tuple[Mapping[str, Any], ...] = ()
    """The dictionaries of a ``.pt`` that is a list of them."""

    @property
    def suffix(self) -> str:
        """The end of the file's name in lower case and without its dot, such as ``"pt"``."""
        return self.name.rpartition(".")[2].lower()


@dataclass(frozen=True)
class Picture:
    """One tensor of latents in a file, with what the file says about it."""

    tensor: Lazy
    one: bool = False
    """Whether it is one image without a batch axis, (C, h, w) or (C, frames, h, w), even if its shape could also be
    read as something else."""
    label: str = ""
    """What distinguishes the picture from others in its file. It becomes a part of the output's name."""
    height: object = None
    """The height in pixels as the file gives it, unchecked: one value for all images, or a list with one for each.
    None: the file gives none."""
    width: object = None
    """The width in pixels, likewise."""
    raw: object = None
    """Whether the latents are raw, likewise."""
    feature_order: object = None
    """In which order the features of FLUX.2's patches are, likewise."""
    ids: Lazy | None = None
    """The position ids of the tokens of FLUX.2's packed latents, (N, 4) or (B, N, 4), if the file has any."""
    ask: str | None = None
    """Why the file alone does not tell whether the latents are raw, so that the user has to; None where it does."""


def pictures_of(held: Contents, expected: Expected) -> list[Picture] | None:
    """Find the pictures in a file that another program wrote.

    Args:
        held: what the file holds.
        expected: how the job reads its inputs; its ``format`` is that of the checkpoint they will be decoded with.

    Returns:
        The pictures, none of them where the file is known to hold something else, such as what a text encoder gave.
        None where no program that is known here wrote the file.
    """
    for layout in _LAYOUTS:
        if (found := layout(held, expected)) is not None:
            return found
    return None


# -- what latents were made for ----------------------------------------------------------------------------------------

_FLUX1, _SD3, _SDXL, _SD = ("FLUX.1", 16, 0.3611), ("SD3", 16, 1.5305), ("SDXL", 4, 0.13025), ("SD", 4, 0.18215)
_FLUX2 = ("FLUX.2", 32, 1.0)
_Space = tuple[str, int, float]
"""A model that latents were scaled for: its name, its number of latent channels and its scaling_factor."""


def _ask(space: _Space | None, program: str, said: str, format: LatentFormat) -> str | None:
    """Return why the user has to say whether latents are raw, or None where they may be taken as scaled.

    Two models may have latents of the same shape and other factors, so a checkpoint of the wrong one would decode them
    to a wrong picture without an error.

    Args:
        space: the model that the program scaled the latents for; None: one that is not known here.
        program: the program's name.
        said: the file's own name for the model.
        format: the latent format of the checkpoint that is to decode them.
    """
    if space is None:
        return f"{program} made it for {said!r}, of which fluxvae does not know whether it is raw or scaled"
    name, channels, factor = space
    if channels == format.channels and format.frames:
        return (
            f"{program} made it for {name}, and this checkpoint has latents_mean and latents_std where {name} has a "
            "scaling_factor: use that model's VAE, or say what it is in spite of that"
        )
    if channels == format.channels and not format.preview and factor != format.scaling_factor:
        return (
            f"{program} scaled it for {name} (scaling_factor {factor}), and this checkpoint's scaling_factor is "
            f"{format.scaling_factor}: use that model's VAE, or say what it is in spite of that"
        )
    return None


# -- ComfyUI -----------------------------------------------------------------------------------------------------------


def _comfyui(held: Contents, expected: Expected) -> list[Picture] | None:
    """Recognise what ComfyUI's node SaveLatent writes and LoadLatent reads (both in ``nodes.py``).

    Such latents are what ComfyUI's VAE decodes, so they are raw. Those of FLUX.2 are normalised patches, because there
    ComfyUI's VAE applies the checkpoint's statistics itself.
    """
    if "latent_tensor" not in held.tensors:
        return None
    tensor, format = held.tensors["latent_tensor"], expected.format
    channels = tensor.shape[1] if len(tensor.shape) > 3 else 0
    if "latent_format_version_0" not in held.tensors:  # from before May 2023; LoadLatent multiplies by 1 / 0.18215
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
    """Recognise the ``*_flux.npz`` of sd-scripts (``save_latents_to_disk`` in ``library/strategy_base.py``)."""
    if held.suffix != "npz" or not any(name.startswith(("original_size", "crop_ltrb")) for name in held.tensors):
        return None
    model = held.name[: -len(".npz")].rpartition("_")[2]
    return _kohya(held, expected.format, "sd-scripts", model, _SD_SCRIPTS.get(model))


def _kohya_safetensors(held: Contents, expected: Expected) -> list[Picture] | None:
    """Recognise what musubi-tuner (``cache_io.py``) and sd-scripts' branch ``new_cache`` write.

    The ``height`` and ``width`` in their metadata are not used: they are the original picture's, and the latents have
    the size of the bucket that the trainer put the picture into.
    """
    if "architecture" not in held.values or "format_version" not in held.values:
        return None
    model, format = str(held.values["architecture"]), expected.format
    if model == "z_image":  # the cache holds what FLUX.1's VAE encoded, and training scales it later
        found = _kohya(held, format, "musubi-tuner", model, _FLUX1)
        return [each if each.ask else replace(each, raw=True) for each in found]
    known = _MUSUBI | _SD_SCRIPTS
    return _kohya(held, format, "sd-scripts" if model in _SD_SCRIPTS else "musubi-tuner", model, known.get(model))


def _kohya(held: Contents, format: LatentFormat, program: str, model: str, space: _Space | None) -> list[Picture]:
    """Return the tensors that are named as both of kohya-ss' programs name latents.

    Where a file has latents of several sizes or dtypes, these become a part of the labels, to tell them apart.
    """
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
    """Recognise what ai-toolkit writes (``_cache_one_latent`` in ``toolkit/dataloader_mixins.py``).

    Its latents are always scaled; those of FLUX.2 are normalised patches.
    """
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
    """Recognise what OneTrainer writes: mgds' ``DiskCache``.

    The names are those that ``FluxBaseDataLoader`` and ``Flux2BaseDataLoader`` give. The latents are the mean of the
    VAE's distribution, which is raw. OneTrainer scales it when it uses it.
    """
    if "latent_image" not in held.tensors:
        return None
    names = {"latent_image": "", "latent_conditioning_image": "conditioning"}
    return [Picture(held.tensors[name], True, label, raw=True) for name, label in names.items() if name in held.tensors]


_TEXTS = ("t5_out", "text_embed", "text_embed_0", "prompt_embeds", "tokens", "tokens_1", "text_encoder_hidden_state")


def _texts(held: Contents, expected: Expected) -> list[Picture] | None:
    """Recognise what trainers keep beside latents: what text encoders gave, and OneTrainer's ``aggregate.pt``.

    These files hold no pictures, so the job skips them instead of reporting them as failures.
    """
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
