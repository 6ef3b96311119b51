"""What a client and the Triton model say to each other, whatever carries it: tensors, parameters, errors.

Pure functions; `fluxvae.serve.client.transports` sends what they make. PyTorch is imported only where there are
tensors: a client of NumPy arrays and pictures starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import re
import sys
import uuid
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxvae.errors import (
    DeadlineExceededError,
    DecodeCancelled,
    FluxVAEError,
    InvalidLatentsError,
    InvalidOptionError,
    MemoryLimitError,
    NonFiniteOutputError,
    UnavailableError,
)
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import Layout, possible_layouts, read_layout
from fluxvae.latents.packing import SizeFlooredWarning, token_positions
from fluxvae.latents.reading import Reading
from fluxvae.serve.families import formats_of_model
from fluxvae.serve.triton_words import passing_trouble

if TYPE_CHECKING:
    import torch

__all__ = ["Request", "Unsent", "error_of", "make_request", "read_answer", "refused_before_work"]

_OUTPUTS = {
    "pil": ("images", np.uint8),
    "uint8": ("images", np.uint8),
    "np": ("images_np", np.float32),
    "pt": ("images_pt", np.float32),
    "raw": ("images_raw", np.float32),
}
_DTYPES = ("float32", "bfloat16", "float16")
_SCALE = 8
"""How many pixels there are for each latent, in each direction, with every VAE of the FLUX family."""
_OPTIONS = frozenset(
    {
        "batch_norm_eps",
        "format",
        "layout",
        "output_type",
        "parameter",
        "probe",
        "quality",
        "raw",
        "scaling_factor",
        "shift_factor",
    }
)
"""Words with which errors about options begin."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One request to the model: latents and what was said about them, as they are sent."""

    latents: NDArray[np.float32]
    """(B, patches, 4*C), or (B, C, lh * lw) with the parameter ``layout``."""
    height: int
    width: int
    output_type: str
    parameters: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    """0 stands for the model's default."""
    id: str = ""
    latent_ids: NDArray[np.int64] | None = None
    """(B, patches, 4), for FLUX.2's packed latents."""

    @property
    def output(self) -> str:
        """The name of the model's output that is asked for."""
        return _OUTPUTS[self.output_type][0]

    @property
    def answer_dtype(self) -> np.dtype[Any]:
        """The dtype of that output."""
        return np.dtype(_OUTPUTS[self.output_type][1])

    @property
    def answer_bytes(self) -> int:
        """How many bytes the output takes at most. It takes fewer where the server floors the size."""
        return len(self.latents) * 3 * self.height * self.width * self.answer_dtype.itemsize

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """The tensors that are sent, by name."""
        rows = (len(self.latents), 1)
        size = {"height": self.height, "width": self.width}
        sent: dict[str, NDArray[Any]] = {name: np.full(rows, value, np.int32) for name, value in size.items()}
        ids = {} if self.latent_ids is None else {"latent_ids": self.latent_ids}
        return {"latents": self.latents, **sent, **ids}


class Unsent(UnavailableError):
    """No connection came about, so the request was not sent and is safe to repeat."""


def make_request(
    latents: torch.Tensor | NDArray[Any],
    reading: Reading,
    *,
    model: str,
    output_type: str,
    priority: int | None = None,
    request_id: str | None = None,
) -> Request:
    """Return the request to a model for these latents.

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
    if output_type not in _OUTPUTS:
        raise InvalidOptionError(f"output_type: got {output_type!r}, expected one of {', '.join(_OUTPUTS)}")
    if priority is not None and (isinstance(priority, bool) or not isinstance(priority, int) or priority < 1):
        raise InvalidOptionError(f"priority: got {priority!r}, expected a whole number from 1, the first to be served")
    dtype = str(getattr(latents, "dtype", "")).removeprefix("torch.")
    if not (_is_tensor(latents) or isinstance(latents, np.ndarray)) or dtype not in _DTYPES:
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
    sent = latents.reshape(layout.shape)
    parameters: dict[str, Any] = {}
    ids: NDArray[np.int64] | None = None
    if reading.latent_ids is not None:
        ids, (gh, gw) = _ids(reading.latent_ids, layout, one_image=len(shape) == 2)
        if height is None and width is None:
            height, width = 2 * _SCALE * gh, 2 * _SCALE * gw
    if layout.size is not None:
        height, width = layout.size
        sent = sent.reshape(*layout.shape[:2], -1)
        parameters["layout"] = "unpacked"
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 < value < 2**31:
            raise InvalidLatentsError(
                f"{name}: got {value!r}, expected a positive whole number of pixels; packed latents need both"
            )
    if reading.raw is not None and not isinstance(reading.raw, bool):
        raise InvalidOptionError(f"raw: got {reading.raw!r}, expected True, False or None")
    parameters |= reading.parameters()
    assert height is not None
    assert width is not None
    return Request(
        latents=_as_float32(sent),
        height=int(height),
        width=int(width),
        output_type=output_type,
        parameters=parameters,
        priority=priority or 0,
        id=request_id or uuid.uuid4().hex,
        latent_ids=ids,
    )


def _is_tensor(value: object) -> bool:
    """Return whether it is a tensor. PyTorch is not imported for that, because whoever has a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_float32(latents: Any) -> NDArray[np.float32]:
    """Return a tensor or an array as a float32 array in C order, which is a copy only where it has to be."""
    if isinstance(latents, np.ndarray):
        return np.ascontiguousarray(latents, np.float32)
    array: NDArray[np.float32] = latents.detach().to("cpu").float().contiguous().numpy()
    return array


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
    return read_layout(shape, formats, height, width, with_ids=with_ids)


def read_answer(request: Request, array: NDArray[Any]) -> Any:
    """Return the output as ``decode`` returns it. ``array`` may be a view of memory that is used again.

    A `SizeFlooredWarning` tells where the server decoded a smaller size than was asked for.
    """
    channels_first = request.output in ("images_pt", "images_raw")
    size = array.shape[2:4] if channels_first else array.shape[1:3]
    if array.ndim != 4 or len(array) != len(request.latents) or array.dtype != request.answer_dtype:
        raise FluxVAEError(
            f"{request.output}: got {array.dtype} {array.shape} from the server, expected {len(request.latents)} "
            f"images in {request.answer_dtype}; is it fluxvae's model?"
        )
    if size != (request.height, request.width):
        warnings.warn(
            f"height and width: got {request.height}x{request.width} (height x width), which are not multiples of 16; "
            f"the server decoded {size[0]}x{size[1]}, as FluxPipeline does",
            SizeFlooredWarning,
            stacklevel=4,
        )
    if request.output_type == "pil":
        from PIL import Image

        return [Image.fromarray(one) for one in array]  # this copies the pixels
    array = array.copy()  # so that it is writable, and the caller's own
    if not channels_first:
        return array
    import torch

    return torch.from_numpy(array)


_FULL = "Exceeds maximum queue size"
_LATE = "Request timeout expired"


def refused_before_work(error: BaseException) -> bool:
    """Return whether a request can be repeated without anything being done twice.

    That is so where it was not sent, and where the server's queue was full.
    """
    return isinstance(error, Unsent) or (isinstance(error, UnavailableError) and _FULL in str(error))


def error_of(status: str, message: str, request: Request, *, model: str, timeout_s: float) -> FluxVAEError:
    """Return the error that the library would have raised, or the one that is nearest to it.

    Args:
        status: gRPC's name of what happened, such as ``"INVALID_ARGUMENT"``.
        message: the words of the server or of gRPC.
    """
    where = f"(request {request.id})"
    if status == "INVALID_ARGUMENT":
        field_name = re.match(r"[\w ]+?(?=:| ')", message)
        name = field_name[0] if field_name else ""
        if name == "memory_limit":
            return MemoryLimitError(message)
        return InvalidOptionError(message) if name in _OPTIONS else InvalidLatentsError(message)
    if status == "DEADLINE_EXCEEDED" or (status == "UNAVAILABLE" and _LATE in message):
        return DeadlineExceededError(
            f"timeout_s: no answer within {timeout_s:.3g} s {where}; the decode was cancelled. Allow more, or send less"
        )
    if status == "CANCELLED":
        return DecodeCancelled(f"{message} {where}")
    if status == "UNAVAILABLE":
        if "failed to connect" in message:
            return Unsent(f"no connection to the server: {message} {where}; is it running, and at this address?")
        return UnavailableError(f"the server cannot take it now: {message} {where}; try again later")
    if status == "INTERNAL" and (trouble := passing_trouble(message)):
        return UnavailableError(f"{trouble}: {message} {where}; try again later")
    if status == "NOT_FOUND":
        return InvalidOptionError(f"model: got {model!r}, which this server does not have: {message}")
    if "NaN or Inf" in message or "out of range" in message:
        return NonFiniteOutputError(message)
    return FluxVAEError(f"the server failed with {status}: {message} {where}")
