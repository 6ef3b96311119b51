"""Makes the requests that encode pictures, and latents of their answers. Pure functions.

PIL is imported where there are pictures to send, because a client that decodes to arrays does without it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxvae.arrays import is_tensor, nearest_pixels
from fluxvae.errors import FluxVAEError, InvalidImagesError, InvalidOptionError
from fluxvae.latents.reading import Reading
from fluxvae.serve.client.wire import SCALE, Request, as_float32, envelope, rescaling
from fluxvae.serve.families import formats_of, formats_of_model
from fluxvae.serve.models import LARGEST_SEED, MODELS, encoder_of, encodes, vae_class_of

if TYPE_CHECKING:
    import torch

    from fluxvae.pixels import Images

__all__ = ["make_encode_request", "make_pixels_request", "resolve_encoder"]

_RESIZABLE = ("uint8", "float16", "float32")
"""The dtypes of arrays that are resized here. Which pixels PyTorch takes of float64 depends on how it computes them."""


def resolve_encoder(model: str, encoder_model: str | None) -> str | None:
    """Return the name of the model that a client encodes with; None where it knows none.

    Args:
        model: the name of the model that it decodes with.
        encoder_model: what the caller says; None: the model that encodes what ``model`` decodes.

    Raises:
        InvalidOptionError: the caller names a model that decodes.
    """
    if encoder_model is None:
        return encoder_of(model)
    if encoder_model in MODELS and not encodes(encoder_model):
        raise InvalidOptionError(
            f"encoder_model: got {encoder_model!r}, which decodes latents and encodes no pictures; expected a model "
            f"such as {encoder_of(encoder_model) or 'vae_encoder'!r}"
        )
    return encoder_model


def make_encode_request(
    images: Any,
    *,
    model: str | None,
    packed: bool = True,
    sample: int | None = None,
    resize: bool = False,
    raw: bool = False,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    batch_norm_eps: float | None = None,
    priority: int | None = None,
    request_id: str | None = None,
) -> Request:
    """Return the request to encode these pictures.

    The pictures are checked here as `fluxvae.Encoder` checks them; arrays of float64 are refused where they are to be
    resized. The server checks the rest, because it knows the checkpoint.

    Args:
        model: the model's name, which tells the class of its VAE. None: there is none.
        images, packed, ...: as for `Client.encode`.

    Raises:
        InvalidImagesError, InvalidOptionError: something cannot be sent.
    """
    from fluxvae.pixels import check_images

    model = _known(model)
    for name, value in (("packed", packed), ("raw", raw)):
        if not isinstance(value, bool):
            raise InvalidOptionError(f"{name}: got {value!r}, expected True or False")
    reading = Reading(
        raw=raw or None, scaling_factor=scaling_factor, shift_factor=shift_factor, batch_norm_eps=batch_norm_eps
    )
    parameters = {**rescaling(reading), **_seed(sample)}
    # Sizes are checked, and made to fit, by what the model's name tells. The server checks by its checkpoint.
    multiple = formats_of(vae_class_of(model))[0].multiple(packed=packed, raw=raw)
    checked = check_images(images, multiple, None, resize=resize)
    return Request(
        model=model,
        inputs=_inputs(checked),
        output="latents" if packed else "latents_unpacked",
        answer_dtype=np.dtype(np.float32),
        answer_bytes=_most_bytes(model, checked.batch, checked.height, checked.width),
        read=partial(_read_latents, batch=checked.batch, ndim=3 if packed else 4, as_tensor=is_tensor(images)),
        refusal=InvalidImagesError,
        parameters=parameters,
        **envelope(priority, request_id),
    )


def make_pixels_request(pixels: torch.Tensor, *, model: str | None, output: str = "moments") -> Request:
    """Return the request to encode pixels (B, 3 or 4, H, W) in [-1, 1], with the server's own factors.

    Args:
        model: as for `make_encode_request`.
        output: what its answer is, a float32 tensor: for ``"moments"`` the distribution of the raw latents,
            (B, 2*C, lh, lw), the mean and the log variance before it is clamped; for ``"latents_unpacked"`` the mode of
            it with the model's scaling, (B, C, lh, lw), or FLUX.2's patches (B, 4*C, gh, gw).

    Raises:
        InvalidOptionError: there is no model.
    """
    model = _known(model)
    batch, _, height, width = pixels.shape
    return Request(
        model=model,
        inputs={"images_raw": as_float32(pixels)},
        output=output,
        answer_dtype=np.dtype(np.float32),
        answer_bytes=(2 if output == "moments" else 1) * _most_bytes(model, batch, height, width),
        read=partial(_read_latents, batch=batch, ndim=4, as_tensor=True),
        refusal=InvalidImagesError,
        parameters={},
        **envelope(None, None),
    )


def _known(model: str | None) -> str:
    if model is None:
        raise InvalidOptionError(
            "encoder_model: got None, and no model is known to encode what this client's model decodes; name one: "
            "Client(url, encoder_model='vae_encoder')"
        )
    return model


def _seed(sample: object) -> dict[str, Any]:
    """The parameters that ask for a sample instead of the mode."""
    if sample is None:
        return {}
    if isinstance(sample, bool) or not isinstance(sample, (int, np.integer)) or not 0 <= sample <= LARGEST_SEED:
        shown = repr(sample) if isinstance(sample, (int, float)) else type(sample).__name__
        raise InvalidOptionError(
            f"sample: got {shown}, expected a seed, a whole number from 0 to 2**63 - 1: the server draws with "
            "torch.Generator('cpu').manual_seed(sample), because a generator cannot be sent"
        )
    return {"sample": True, "seed": int(sample)}


def _inputs(images: Images) -> dict[str, NDArray[Any]]:
    """The model's input for these images: 8-bit values as they are, floats in [-1, 1], computed in their own dtype."""
    values = _resized(images) if images.resized else images.values
    if isinstance(values, list):
        mode = "RGBA" if images.channels == 4 else "RGB"
        return {"images": np.stack([np.asarray(image.convert(mode)) for image in values])}
    if isinstance(values, np.ndarray):
        if values.dtype == np.uint8:
            return {"images": np.ascontiguousarray(values)}
        values = values.transpose(0, 3, 1, 2)
    return {"images_raw": as_float32(2.0 * values - 1.0)}


def _resized(images: Images) -> Any:
    """The values at the size that they are encoded at, made by the filters of ``VaeImageProcessor.preprocess``."""
    values, size = images.values, (images.height, images.width)
    if isinstance(values, list):
        from PIL import Image

        return [image.resize(size[::-1], Image.Resampling.LANCZOS) for image in values]
    if isinstance(values, np.ndarray):
        if values.dtype.name not in _RESIZABLE:
            raise InvalidImagesError(
                f"images: got an array of {values.dtype} with resize=True, expected one of {', '.join(_RESIZABLE)}; "
                "convert it first: images.astype('float32')"
            )
        rows, columns = (nearest_pixels(given, wanted) for given, wanted in zip(values.shape[1:3], size, strict=True))
        taken = values[:, rows[:, None], columns]
        return taken if taken.dtype == np.uint8 else taken.astype(np.float32)  # which arrays that are resized become
    import torch

    return torch.cat([torch.nn.functional.interpolate(one[None], size=size) for one in values])


def _most_bytes(model: str, batch: int, height: int, width: int) -> int:
    """The most bytes that latents of this size take, in float32, with any checkpoint that the model may have."""
    channels = max(format.channels for format in formats_of_model(model))
    return batch * channels * (height // SCALE) * (width // SCALE) * 4


def _read_latents(array: NDArray[Any], *, batch: int, ndim: int, as_tensor: bool) -> Any:
    """Return the output as ``encode`` returns it. ``array`` may be a view of memory that is used again."""
    if array.ndim != ndim or len(array) != batch or array.dtype != np.float32:
        raise FluxVAEError(
            f"latents: got {array.dtype} {array.shape} from the server, expected {batch} rows in {ndim} dimensions and "
            "float32; is it fluxvae's model?"
        )
    array = array.copy()  # so that it is writable, and the caller's own
    if not as_tensor:
        return array
    import torch

    return torch.from_numpy(array)
