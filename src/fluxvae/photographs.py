"""Opens picture files for encoding: what a header tells, and the picture upright, in sRGB, with alpha or without.

A file may come from anybody, so its size is known and allowed before its pixels are unpacked. What would be changed
without a word on the way to 8-bit RGB is refused: 16 bits, CMYK, an
animation's other frames, and transparency where the VAE has no channel for it.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import IO, Any

from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps

from fluxvae.errors import InvalidImagesError, InvalidOptionError, first_line

__all__ = ["SUFFIXES", "check_background", "ignore_warnings", "picture_of", "size_of"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""The formats that are opened, by Pillow's names. Pillow knows many more, some of which (EPS) run another program."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
_TURNED = (5, 6, 7, 8)
"""EXIF's orientations that exchange height and width."""
_ORIENTATIONS = range(2, 9)
"""EXIF's orientations that turn or mirror a picture."""
_MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA", "RGBa", "La")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, ArithmeticError, MemoryError, EOFError)
"""The errors by which Pillow's readers report a file that is damaged or of another kind."""


def check_background(background: str | None) -> None:
    """Raise InvalidOptionError unless ``background`` is a colour that Pillow knows, such as ``"white"``, or None."""
    if background is not None:
        try:
            ImageColor.getrgb(background)
        except (ValueError, TypeError) as error:  # the latter where it came from JSON and is no text
            raise InvalidOptionError(
                f"background: got {background!r}, expected a colour such as white, black or #808080"
            ) from error


def ignore_warnings() -> None:
    """Ignore what Pillow warns of: large pictures, and what it passes over in metadata.

    Filters belong to the whole process, so this is for one that does nothing else, or for a thread that is inside
    `warnings.catch_warnings` while others read pictures for it. They must not do it themselves: where two of them
    overlap, the filters of the one that began first come back last, or never.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def size_of(name: str, data: IO[bytes], max_pixels: int, *, turned: bool = True) -> tuple[int, int]:
    """Read a picture's header. Return its (height, width) in pixels, once it stands upright.

    Args:
        name: what messages call the picture.
        data: the file.
        max_pixels: the most pixels it may have.
        turned: whether it may lie another way in the file, and be turned by its EXIF.

    Raises:
        InvalidImagesError: it is no picture, is damaged, is larger than allowed, or is of a kind that is refused.
    """
    with _opened(name, data, max_pixels) as image:
        width, height = image.size
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if not turned and orientation in _ORIENTATIONS:
            raise InvalidImagesError(
                f"{name}: is turned by its EXIF (orientation {orientation}), which the program that this cache is for "
                "passes over, so that it would look for another size or show another picture; turn its pixels first"
            )
        return (width, height) if orientation in _TURNED else (height, width)


def picture_of(
    name: str,
    data: IO[bytes],
    max_pixels: int,
    *,
    channels: int,
    background: str | None = None,
    metadata: bool = True,
) -> Image.Image:
    """Read a picture: its pixels as 8-bit RGB, on the background; or with its alpha, as RGBA.

    Args:
        channels: those that the VAE takes. With 4 the picture keeps its alpha where no background is given.
        background: the colour that shows through transparent pixels. With None, a VAE of 3 channels refuses a picture
            that has any.
        metadata: whether it is turned upright as its orientation says, and brought to sRGB as its colour profile says.
            Otherwise its pixels are taken as they lie, as diffusers takes those of a PIL image.

    Raises:
        InvalidImagesError: as `size_of`; or its pixels cannot be read to the end, or are transparent.
    """
    with _opened(name, data, max_pixels) as image:
        image.load()
        picture = _in_srgb(name, ImageOps.exif_transpose(image)) if metadata else image
        if channels == 4 and background is None:
            return picture.convert("RGBA")
        return _without_alpha(name, picture, background)


@contextlib.contextmanager
def _opened(name: str, data: IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    try:
        with Image.open(data, formats=_FORMATS) as image:
            _check_kind(name, image, max_pixels)
            yield image
    except Image.DecompressionBombError as error:
        raise InvalidImagesError(
            f"{name}: claims more pixels than Pillow opens ({first_line(error)}); make it smaller, or cut it up"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, InvalidImagesError):
            raise
        raise InvalidImagesError(
            f"{name}: cannot be read as a picture: {first_line(error)}; it is damaged, truncated or another kind of "
            "file"
        ) from error


def _check_kind(name: str, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidImagesError(
            f"{name}: claims {height}x{width} = {width * height} pixels, more than the {max_pixels} that one picture "
            "may have; raise max_pixels if it is meant"
        )
    if getattr(image, "n_frames", 1) > 1:
        raise InvalidImagesError(
            f"{name}: is an animation, or has several pages: {image.n_frames} of them; save the one that is meant"  # type: ignore[attr-defined]
        )
    if _bits(image) > 8:
        raise InvalidImagesError(
            f"{name}: has more than 8 bits for each value, which would be cut off; convert it to 8 bits first"
        )
    if image.mode not in _MODES:
        raise InvalidImagesError(
            f"{name}: is in mode {image.mode}, expected RGB or grey; convert it first, by its colour profile"
        )


def _bits(image: Any) -> int:
    """Bits of one value in the file. Pillow cuts 16-bit RGB off to 8 bits as it reads it, so the mode does not tell."""
    if image.mode.startswith("I") or image.mode == "F":
        return 16
    raw = image.tile[0][3] if image.tile else ""  # the arguments of its decoder; before Pillow 11 they had no name
    if image.format == "PPM" and isinstance(raw, tuple) and isinstance(raw[-1], int) and raw[-1] > 255:
        return 16  # the largest value, which Pillow brings to 255
    raw = raw if isinstance(raw, str) else raw[0] if isinstance(raw, tuple) and raw else ""
    if str(raw).endswith((";16B", ";16L", ";16N", ";16", ";16S")):
        return 16
    found = getattr(image, "tag_v2", {}).get(258, (8,))  # TIFF's BitsPerSample
    return max(found) if isinstance(found, tuple) else int(found)


def _in_srgb(name: str, image: Image.Image) -> Image.Image:
    """The picture with its colour profile applied, if it has one."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode not in ("RGB", "RGBA", "L", "LA"):  # a palette, whose colours the profile is for
        clear = image.mode in _ALPHA or "transparency" in image.info
        image = image.convert("RGBA" if clear else "RGB")
    if "transparency" in image.info:  # one colour that is transparent, which would change and be seen no more
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode in ("L", "LA"):  # a profile of grey: what is applied to it is one curve
            srgb = ImageCms.createProfile("sRGB")
            grey = ImageCms.profileToProfile(image.convert("L"), source, srgb, outputMode="RGB")
            assert grey is not None
            if image.mode == "LA":
                grey.putalpha(image.getchannel("A"))
            return grey
        made = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
        assert made is not None
        return made
    except (ImageCms.PyCMSError, OSError) as error:
        raise InvalidImagesError(
            f"{name}: has a colour profile that cannot be applied: {first_line(error)}; convert it to sRGB first"
        ) from error


def _without_alpha(name: str, image: Image.Image, background: str | None) -> Image.Image:
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if background is None:
        if image.getchannel("A").getextrema() != (255, 255):
            raise InvalidImagesError(
                f"{name}: has transparent pixels, and latents hold none; a background, such as white, says what shows "
                "through"
            )
        return image.convert("RGB")
    behind = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3])
    return Image.alpha_composite(behind, image).convert("RGB")
