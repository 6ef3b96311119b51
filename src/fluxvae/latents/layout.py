"""Reads from the shape of latents whether they are packed or images, and whether they come with their batch.

    (B, N, 4*C)                       packed: tokens of B images              (N, 4*C): of one image
    (B, C, lh, lw)                    B images                                (C, lh, lw): one image
    (B, C, 1, lh, lw)                 one frame of each, as video VAEs shape it   (C, 1, lh, lw): of one image
    (B, C, L, lh, lw)                 where frames are layers: L images of each, so B*L images
    (B, L*gh*gw, 4*C)                 the same, packed: the tokens of one layer after those of another
    with 4*C channels for C           FLUX.2's images in 2x2 patches, half as high and wide

Every door asks `read_layout`: the library, the Triton model, the gateway, the client and files. The number of channels
or features decides. Only one shape can be read in two ways, ``(C, n, 4*C)``: as C packed images of n tokens, or as one
image of n x 4*C latents. Position ids mean that they are packed. Otherwise height and width decide, because they can
only fit one reading: the image is ``s*n`` by ``s*4*C`` pixels (s pixels per latent), of which packed latents would have
``(n//2) * 2*C`` tokens, and for two channels or more that is never n, nor is n a multiple of it. Without both of them
such latents are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fluxvae.errors import InvalidLatentsError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.packing import pixels

__all__ = ["Layout", "in_shape", "layers_in", "other_family", "possible_layouts", "read_layout", "unpacked_shape"]

_FAMILIES = {
    4: "SD or SDXL (4 latent channels)",
    16: "FLUX.1, one of its borrowers, or SD3 (16 latent channels)",
    32: "FLUX.2 (32 latent channels)",
    128: "FLUX.2 in 2x2 patches (32 latent channels)",
}
_PACKED_FAMILIES = {
    64: "FLUX.1 (16 latent channels)",
    128: "FLUX.2 (32 latent channels)",
    16: "SD or SDXL (4 latent channels)",
}


class Layout(NamedTuple):
    """How the shape of latents is to be understood."""

    format: LatentFormat
    """The format that they are in, among those that were possible."""
    packed: bool
    shape: tuple[int, ...]
    """The shape with the batch and without frames: packed (B, N, 4*C), or images (B, C, lh, lw) or (B, 4*C, gh, gw).
    `in_shape` gives latents this shape. Of packed layers N counts the tokens of all, because the height and the width
    that tell them apart may come later; `layers_in` says how many there are."""
    size: tuple[int, int] | None
    """The (height, width), in pixels, that images decode to. None for packed latents, whose shape does not tell it."""

    @property
    def batch(self) -> int:
        """The number of images."""
        return self.shape[0]


def possible_layouts(shape: tuple[int, ...], formats: Sequence[LatentFormat]) -> list[Layout]:
    """Return every layout that the numbers of channels and features allow: none, one, or two (packed first)."""
    found: dict[tuple[bool, tuple[int, ...]], Layout] = {}
    for format in formats:
        if len(shape) in (2, 3) and shape[-1] == format.packed_features:
            packed = shape if len(shape) == 3 else (1, *shape)
            found.setdefault((True, packed), Layout(format, True, packed, None))
    for format in formats:
        if (images := _as_images(shape, format)) is not None:
            in_patches = images[1] != format.channels
            scale = format.packed_multiple if in_patches else format.vae_scale_factor
            size = (images[2] * scale, images[3] * scale)
            found.setdefault((False, images), Layout(format, False, images, size))
    return list(found.values())


def read_layout(
    shape: tuple[int, ...],
    formats: Sequence[LatentFormat],
    height: object = None,
    width: object = None,
    *,
    with_ids: bool = False,
) -> Layout:
    """Return the one layout of latents of this shape.

    Args:
        shape: the shape of the latents, in which no dimension is 0.
        formats: the formats they may have; one where the checkpoint is known. Of several, errors name the first.
        height, width: in pixels, where they are known. Images must have exactly this size. What packed latents need of
            it is for `checks` to say, except where it must tell two layouts apart.
        with_ids: whether position ids came with the latents.

    Raises:
        InvalidLatentsError: the latents have no layout, or two and nothing that decides; they are a video; the height
            or the width is not the image's.
    """
    found = possible_layouts(shape, formats)
    if with_ids and found and not (found := [layout for layout in found if layout.packed]):
        raise InvalidLatentsError(
            f"latent_ids: got ids with latents of shape {shape}; they are for packed latents only: leave them out"
        )
    if not found:
        raise InvalidLatentsError(_none(shape, formats[0]))
    layout = found[0] if len(found) == 1 else _decide(shape, found, height, width)
    if layout.size is not None:
        _check_size(shape, layout, height, width)
    return layout


def in_shape(latents: Any, shape: tuple[int, ...]) -> Any:
    """Return latents, a tensor or an array, in the shape that a `Layout` or `checks.check_shape` has found for them.

    The frames of five dimensions become images, those of one batch row after those of another; all else only counts
    its values otherwise.
    """
    return (latents.swapaxes(1, 2) if latents.ndim == 5 else latents).reshape(shape)


def layers_in(format: LatentFormat, tokens: int, height: object, width: object) -> int:
    """Return how many layers the tokens of one batch row are: 1 unless the format's frames are layers.

    Args:
        tokens: N of packed latents (B, N, 4*C).
        height, width: the size of a layer in pixels. If whole layers of this size do not make up N, the answer is 1,
            and `packing.floor_size` refuses the size.

    Raises:
        InvalidLatentsError: the height or the width is no positive whole number of pixels.
    """
    multiple = format.packed_multiple
    patches = pixels("height", height) // multiple * (pixels("width", width) // multiple)
    return tokens // patches if format.layers and patches and tokens % patches == 0 else 1


def unpacked_shape(format: LatentFormat) -> str:
    """Return the shape of a format's unpacked latents, in words."""
    scale = format.vae_scale_factor
    patches = f", or in patches (batch, {4 * format.channels}, height/{2 * scale}, width/{2 * scale})"
    return f"(batch, {format.channels}, height/{scale}, width/{scale})" + (patches if format.flux2 else "")


def other_family(shape: tuple[int, ...], format: LatentFormat, *, packed: bool) -> str:
    """Return, for an error about the size, what latents of three dimensions look like when they are read the other way.

    The text is empty where they look like nothing that is known.
    """
    if len(shape) != 3:
        return ""
    if packed and shape[0] in _FAMILIES and shape[0] != format.channels:
        return f". As one image without its batch they have {shape[0]} channels, which look like {_FAMILIES[shape[0]]}"
    if not packed and shape[2] in _PACKED_FAMILIES and shape[2] != format.packed_features:
        return f". As packed latents they have {shape[2]} features, which look like {_PACKED_FAMILIES[shape[2]]}"
    return ""


def _takes(channels: int, format: LatentFormat) -> bool:
    return channels == format.channels or (format.flux2 and channels == 4 * format.channels)


def _as_images(shape: tuple[int, ...], format: LatentFormat) -> tuple[int, int, int, int] | None:
    """Return (B, C, rows, columns), or None where the shape cannot be read so.

    (C, 1, lh, lw) is one frame of one image and no batch of C images, because no model's latents have one channel.
    """
    match shape:
        case (batch, channels, frames, rows, columns) if _takes(channels, format) and (frames == 1 or format.layers):
            return batch * frames, channels, rows, columns
        case (batch, channels, rows, columns) if _takes(channels, format):
            return batch, channels, rows, columns
        case (channels, 1, rows, columns) if _takes(channels, format):
            return 1, channels, rows, columns
        case (channels, rows, columns) if _takes(channels, format):
            return 1, channels, rows, columns
    return None


def _decide(shape: tuple[int, ...], found: list[Layout], height: object, width: object) -> Layout:
    """Return the one of two layouts, packed and image, that height and width fit."""
    packed, image = found
    assert packed.packed
    assert image.size is not None
    multiple = packed.format.packed_multiple
    both = (
        f"{shape[0]} packed images of {shape[1]} patches each, or one image of {image.size[0]}x{image.size[1]} "
        "(height x width) without its batch"
    )
    if height is None or width is None:
        raise InvalidLatentsError(
            f"latents: got shape {shape} with height={height}, width={width}, which may be {both}; pass height and "
            f"width, which tell the two apart, or the one image with its batch: {image.shape}"
        )
    size = (pixels("height", height), pixels("width", width))
    patches = size[0] // multiple * (size[1] // multiple)
    fits = [patches * layers_in(packed.format, shape[1], *size) == shape[1], size == image.size]
    if fits.count(True) != 1:
        raise InvalidLatentsError(
            f"height and width: got {size[0]}x{size[1]} (height x width) for latents of shape {shape}, which may be "
            f"{both}; they fit {'both' if all(fits) else 'neither'}: packed images of {shape[1]} patches need a height "
            f"and width of which (height // {multiple}) * (width // {multiple}) is {shape[1]}. Pass the size that the "
            f"latents were made for, or the one image with its batch: {image.shape}"
        )
    return packed if fits[0] else image


def _check_size(shape: tuple[int, ...], layout: Layout, height: object, width: object) -> None:
    assert layout.size is not None
    for name, given, actual in zip(("height", "width"), (height, width), layout.size, strict=True):
        if given is not None and pixels(name, given) != actual:
            raise InvalidLatentsError(
                f"{name}: got {given}, but unpacked latents of shape {shape} decode to "
                f"{layout.size[0]}x{layout.size[1]} (height x width); leave {name} out or pass {actual}"
                + other_family(shape, layout.format, packed=False)
            )


def _none(shape: tuple[int, ...], format: LatentFormat) -> str:
    """Return the words that say why latents of this shape have no layout."""
    maker = "use the checkpoint of the model that made the latents"
    if len(shape) in (2, 3):
        features = shape[-1]
        looks = f", which looks like {_PACKED_FAMILIES[features]}" if features in _PACKED_FAMILIES else ""
        ours = f", {_PACKED_FAMILIES[format.packed_features]}" if format.packed_features in _PACKED_FAMILIES else ""
        message = (
            f"latents: got {features} features per token{looks}, shape {shape}; expected {format.packed_features} for "
            f"this checkpoint{ours}"
        )
        if len(shape) == 3:
            looks = f", which look like {_FAMILIES[shape[0]]}" if shape[0] in _FAMILIES else ""
            ours = unpacked_shape(format).replace("batch, ", "")
            message += f". Read as one image without its batch they have {shape[0]} channels{looks}; expected {ours}"
        return f"{message}; {maker}"
    if len(shape) in (4, 5):
        channels = shape[1]
        frames = f"{'batch, ' if len(shape) == 5 else ''}channels, frames, height/8, width/8"
        if len(shape) == 5 and _takes(channels, format):
            return (
                f"latents: got shape {shape}, a video of {shape[2]} frames ({frames}); expected one frame: videos are "
                "not decoded here"
            )
        looks = f", which looks like {_FAMILIES[channels]}" if channels in _FAMILIES else ""
        message = (
            f"latents: got {channels} channels, shape {shape}{looks}; expected {unpacked_shape(format)} for this "
            f"checkpoint; {maker}"
        )
        if len(shape) == 4 and _takes(shape[0], format):
            if format.layers:
                message += f". If they are {channels} layers of one image ({frames}): pass them with their batch"
            else:
                message += f". If it is a video of {channels} frames ({frames}): videos are not decoded here"
        return message
    return (
        f"latents: got {len(shape)} dimensions, shape {shape}; expected packed latents "
        f"(batch, patches, {format.packed_features}) or unpacked ones {unpacked_shape(format)}; one image may come "
        "without its batch"
    )
