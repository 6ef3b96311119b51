"""Makes the requests that decode latents, and images of their answers. Pure functions."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxvae.arrays import is_tensor
from fluxvae.errors import FluxVAEError, InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import Layout, in_shape, possible_layouts, read_layout
from fluxvae.latents.packing import SizeFlooredWarning, token_positions
from fluxvae.latents.reading import Reading
from fluxvae.serve.client.wire import SCALE, Request, as_float32, envelope, rescaling
from fluxvae.serve.families import formats_of_model, refuse_layers
from fluxvae.serve.models import encodes

if TYPE_CHECKING:
    import torch

__all__ = ["make_decode_request"]

_OUTPUTS = {
    "pil": ("images", np.uint8),
    "uint8": ("images", np.uint8),
    "np": ("images_np", np.float32),
    "pt": ("images_pt", np.float32),
    "raw": ("images_raw", np.float32),
}
_DTYPES = ("float32", "bfloat16", "float16")


def make_decode_request(
    latents: torch.Tensor | NDArray[Any],
    reading: Reading,
    *,
    model: str,
    output_type: str,
    priority: int | None = None,
    request_id: str | None = None,
) -> Request:
    """Return the request to decode these latents.

    Types are checked here, and the shape as far as it must be known. The server checks the rest, because it knows the
    checkpoint.

    Args:
        latents: as for `Client.decode`.
        reading: what is said about them.
        model: the model's name, which tells the class of its VAE.
        output_type, priority, request_id: as for `Client.decode`.

    Raises:
        InvalidLatentsError, InvalidOptionError: something cannot be sent.
    """
    if encodes(model):
        raise InvalidOptionError(
            f"model: got {model!r}, which encodes pictures and decodes no latents; decode with a client of another "
            "model, such as 'vae_decoder'"
        )
    if output_type not in _OUTPUTS:
        raise InvalidOptionError(f"output_type: got {output_type!r}, expected one of {', '.join(_OUTPUTS)}")
    dtype = str(getattr(latents, "dtype", "")).removeprefix("torch.")
    if not (is_tensor(latents) or isinstance(latents, np.ndarray)) or dtype not in _DTYPES:
        kind = latents.dtype if hasattr(latents, "dtype") else type(latents).__name__
        raise InvalidLatentsError(f"latents: got {kind}, expected a float32, bfloat16 or float16 tensor or array")
    shape = tuple(latents.shape)
    if 0 in shape:
        raise InvalidLatentsError(
            f"latents: got shape {shape}, which holds no values; every dimension, the batch included, must be at least "
            "1"
        )
    height, width = reading.height, reading.width
    layout = _layout(shape, model, height, width, with_ids=reading.latent_ids is not None)
    sent = in_shape(latents, layout.shape)
    parameters: dict[str, Any] = {}
    ids: dict[str, NDArray[Any]] = {}
    if reading.latent_ids is not None:
        ids["latent_ids"], (gh, gw) = _ids(reading.latent_ids, layout, one_image=len(shape) == 2)
        if height is None and width is None:
            height, width = 2 * SCALE * gh, 2 * SCALE * gw
    if layout.size is not None:
        height, width = layout.size
        sent = sent.reshape(*layout.shape[:2], -1)
        parameters["layout"] = "unpacked"
    height, width = _pixels("height", height), _pixels("width", width)
    if reading.raw is not None and not isinstance(reading.raw, bool):
        raise InvalidOptionError(f"raw: got {reading.raw!r}, expected True, False or None")
    output, kind_of_answer = _OUTPUTS[output_type]
    answer_dtype, batch = np.dtype(kind_of_answer), layout.batch
    size = {"height": height, "width": width}
    rows = {name: np.full((batch, 1), value, np.int32) for name, value in size.items()}
    return Request(
        model=model,
        inputs={"latents": as_float32(sent), **rows, **ids},
        output=output,
        answer_dtype=answer_dtype,
        # Fewer where the pictures are RGB, which only the server knows, and where it floors the size.
        answer_bytes=batch * 4 * height * width * answer_dtype.itemsize,
        read=partial(_read_images, output_type=output_type, batch=batch, size=(height, width)),
        refusal=InvalidLatentsError,
        parameters={**parameters, **rescaling(reading)},
        **envelope(priority, request_id),
    )


def _pixels(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value < 2**31:
        raise InvalidLatentsError(
            f"{name}: got {value!r}, expected a positive whole number of pixels; packed latents need both"
        )
    return int(value)


def _ids(
    latent_ids: torch.Tensor | NDArray[Any], layout: Layout, *, one_image: bool
) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Check position ids; return them with their batch, and the grid that they name."""
    import torch

    ids = torch.from_numpy(latent_ids) if isinstance(latent_ids, np.ndarray) else latent_ids
    if one_image and isinstance(ids, torch.Tensor) and ids.ndim == 2:
        ids = ids[None]
    _, grid = token_positions(ids, layout.shape[0], layout.shape[1])
    return ids.detach().cpu().long().contiguous().numpy(), grid


def _layout(shape: tuple[int, ...], model: str, height: object, width: object, *, with_ids: bool) -> Layout:
    """Return how the shape is to be understood, as far as the model's name tells what it takes."""
    formats = formats_of_model(model)
    if len(shape) in (3, 4) and not possible_layouts(shape, formats):
        # No such model has this number of channels. It is taken for latents with their batch, and the server says what
        # it takes.
        channels = shape[1] if len(shape) == 4 else shape[2] // 4
        formats = (LatentFormat(channels=channels),) if len(shape) == 4 or shape[2] % 4 == 0 else formats
    layout = read_layout(shape, formats, height, width, with_ids=with_ids)
    if len(shape) == 5:
        refuse_layers(shape, shape[2])
    return layout


def _read_images(array: NDArray[Any], *, output_type: str, batch: int, size: tuple[int, int]) -> Any:
    """Return the output as ``decode`` returns it. ``array`` may be a view of memory that is used again.

    A `SizeFlooredWarning` tells where the server decoded a smaller size than was asked for.
    """
    output, expected = _OUTPUTS[output_type]
    channels_first = output in ("images_pt", "images_raw")
    found = array.shape[2:4] if channels_first else array.shape[1:3]
    channels = array.shape[1 if channels_first else -1] if array.ndim == 4 else 0
    if channels not in (3, 4) or len(array) != batch or array.dtype != expected:
        raise FluxVAEError(
            f"{output}: got {array.dtype} {array.shape} from the server, expected {batch} images in "
            f"{np.dtype(expected)}; is it fluxvae's model?"
        )
    if found != size:
        warnings.warn(
            f"height and width: got {size[0]}x{size[1]} (height x width), which are not multiples of 16; the server "
            f"decoded {found[0]}x{found[1]}, as FluxPipeline does",
            SizeFlooredWarning,
            stacklevel=4,
        )
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(one) for one in array]  # this copies the pixels
    array = array.copy()  # so that it is writable, and the caller's own
    if not channels_first:
        return array
    import torch

    return torch.from_numpy(array)
