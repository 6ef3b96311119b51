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
_SCALE = 8  # pixels per latent, each way: every VAE of the FLUX family
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
"""What errors about them begin with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One request to the model."""

    latents: NDArray[np.float32]
    """(B, patches, 4*C), or (B, C, lh * lw) with the parameter layout."""
    height: int
    width: int
    output_type: str
    parameters: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    """0: the model's default."""
    id: str = ""
    latent_ids: NDArray[np.int64] | None = None
    """(B, patches, 4), of FLUX.2's packed latents."""

    @property
    def output(self) -> str:
        """The name of the output that is asked for."""
        return _OUTPUTS[self.output_type][0]

    @property
    def answer_dtype(self) -> np.dtype[Any]:
        """Of the output."""
        return np.dtype(_OUTPUTS[self.output_type][1])

    @property
    def answer_bytes(self) -> int:
        """What the output takes at most: a size that is not a multiple of 16 is floored."""
        return len(self.latents) * 3 * self.height * self.width * self.answer_dtype.itemsize

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """The tensors, by name."""
        rows = (len(self.latents), 1)
        size = {"height": self.height, "width": self.width}
        sent: dict[str, NDArray[Any]] = {name: np.full(rows, value, np.int32) for name, value in size.items()}
        ids = {} if self.latent_ids is None else {"latent_ids": self.latent_ids}
        return {"latents": self.latents, **sent, **ids}


class Unsent(UnavailableError):
    """No connection came about: the request did not leave, and is safe to repeat."""


def make_request(
    latents: torch.Tensor | NDArray[Any],
    *,
    model: str,
    height: int | None,
    width: int | None,
    output_type: str,
    latent_ids: torch.Tensor | NDArray[Any] | None,
    scaling_factor: float | None,
    shift_factor: float | None,
    batch_norm_eps: float | None,
    raw: bool | None,
    priority: int | None,
    request_id: str | None,
) -> Request:
    """The request for these arguments of ``decode`` to this model.

    Types are checked here, and the shape as far as it must be read; the rest by the server.

    Raises:
        InvalidLatentsError, InvalidOptionError: what cannot be put on the wire.
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
    layout = _layout(shape, model, height, width, with_ids=latent_ids is not None)
    sent = latents.reshape(layout.shape)
    parameters: dict[str, Any] = {}
    ids: NDArray[np.int64] | None = None
    if latent_ids is not None:
        ids, (gh, gw) = _ids(latent_ids, layout, one_image=len(shape) == 2)
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
    numbers = {"scaling_factor": scaling_factor, "shift_factor": shift_factor, "batch_norm_eps": batch_norm_eps}
    parameters |= {name: float(number) for name, number in numbers.items() if number is not None}
    if raw is not None:
        if not isinstance(raw, bool):
            raise InvalidOptionError(f"raw: got {raw!r}, expected True, False or None")
        parameters["raw"] = raw
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
    """Whether it is a tensor; who has one has imported PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_float32(latents: Any) -> NDArray[np.float32]:
    """A tensor or an array as an array in C order, without a copy where it is one."""
    if isinstance(latents, np.ndarray):
        return np.ascontiguousarray(latents, np.float32)
    array: NDArray[np.float32] = latents.detach().to("cpu").float().contiguous().numpy()
    return array


def _ids(
    latent_ids: torch.Tensor | NDArray[Any], layout: Layout, *, one_image: bool
) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Position ids with their batch, checked, and the grid they name."""
    import torch

    ids = torch.from_numpy(latent_ids) if isinstance(latent_ids, np.ndarray) else latent_ids
    if one_image and isinstance(ids, torch.Tensor) and ids.ndim == 2:
        ids = ids[None]
    _, grid = token_positions(ids, layout.shape[0], layout.shape[1])
    return ids.detach().cpu().long().contiguous().numpy(), grid


def _layout(shape: tuple[int, ...], model: str, height: object, width: object, *, with_ids: bool) -> Layout:
    formats = formats_of_model(model)
    if len(shape) in (3, 4) and not possible_layouts(shape, formats):
        # Channels of no such model: with their batch, as ever, and the server says what it takes.
        channels = shape[1] if len(shape) == 4 else shape[2] // 4
        formats = (LatentFormat(channels=channels),) if len(shape) == 4 or shape[2] % 4 == 0 else formats
    return read_layout(shape, formats, height, width, with_ids=with_ids)


def read_answer(request: Request, array: NDArray[Any]) -> Any:
    """The output as ``decode`` returns it; ``array`` may be a view that does not live on.

    Warns with `SizeFlooredWarning` where the server decoded a smaller size than was asked for.
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

        return [Image.fromarray(one) for one in array]  # copies
    array = array.copy()  # writable, and the caller's own
    if not channels_first:
        return array
    import torch

    return torch.from_numpy(array)


_FULL = "Exceeds maximum queue size"
_LATE = "Request timeout expired"


def refused_before_work(error: BaseException) -> bool:
    """Whether a request can be repeated without anything being done twice: it did not leave, or the queue was full."""
    return isinstance(error, Unsent) or (isinstance(error, UnavailableError) and _FULL in str(error))


def error_of(status: str, message: str, request: Request, *, model: str, timeout_s: float) -> FluxVAEError:
    """The error that the library would have raised, or the nearest.

    Args:
        status: gRPC's name of it: ``"INVALID_ARGUMENT"``.
        message: as the server or gRPC put it.
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
