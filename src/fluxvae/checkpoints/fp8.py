"""Weights that are stored as scaled 8-bit floats: finds their scales and multiplies them in (``weight * scale``).

ComfyUI stores further tensors beside such weights. This is what they mean, according to its
``utils.convert_old_quants`` and ``ops.mixed_precision_ops``:

    <layer>.scale_weight, <layer>.weight_scale    the factor to multiply by, one for the tensor or one for each output
                                                  channel
    <layer>.scale_input, <layer>.input_scale      the factor for the layer's input, for software that rounds the input
                                                  to 8 bits too; it is ignored here, where nothing computes in 8 bits
    <layer>.comfy_quant                           JSON as bytes: {"format": "float8_e4m3fn", ...}
    scaled_fp8                                    a marker: the weights of this model are scaled and of its dtype
    _quantization_metadata (in the header)        JSON: {"layers": {<layer>: {"format": ...}}}

8-bit floats without any of these are plain numbers. Every other kind of quantised weight is refused by its name, for
read as plain numbers it would give a wrong image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fluxvae.checkpoints.entries import Entry
from fluxvae.checkpoints.files import Weights
from fluxvae.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["EIGHT_BITS", "find_scales", "read_weights"]

EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
_PLAIN = ("float64", "float32", "float16", "bfloat16", *EIGHT_BITS)
_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale")
_FORMAT = "comfy_quant"


def find_scales(
    weights: Weights, names: Mapping[str, str], prefix: str, where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Separate the decoder's own tensors from the scales and markers that are stored beside them.

    Args:
        weights: the file; besides the headers, only the ``comfy_quant`` tensors are read.
        names: maps diffusers' names to the file's, for everything that the decoder's part of the file holds.
        prefix: what stands before the names of the VAE's tensors in the file.
        where: the file, for messages.

    Returns:
        ``names`` without scales and markers; and a map from the file's name of each scaled weight to that of its scale.

    Raises:
        CheckpointError: weights are quantised in a way that is not known here, or a scale is missing, has no weight,
            is there twice, or has a wrong shape or dtype.
    """
    entries = weights.entries
    kept: dict[str, str] = {}
    scales: dict[str, str] = {}
    formats: dict[str, str] = {}
    for name, whole in names.items():
        layer, _, last = whole.rpartition(".")
        if last in _UNUSED or last == "scaled_fp8":
            continue
        if last == _FORMAT:
            formats[layer] = _format_of(next(iter(weights.read([whole])))[1], where, layer)
        elif last in _SCALES:
            weight = f"{layer}.weight"
            if weight not in entries:
                raise CheckpointError(f"checkpoint: {where} holds the scale {whole} without the weight {weight}")
            if weight in scales:
                raise CheckpointError(
                    f"checkpoint: {where} holds two scales of {weight}, {scales[weight]} and {whole}; expected one"
                )
            _check_scale(entries[weight], entries[whole], whole, where)
            scales[weight] = whole
        else:
            kept[name] = whole
    formats |= _formats_in_header(weights, where)
    marker = next((name for name in (f"{prefix}scaled_fp8", "scaled_fp8") if name in entries), None)
    for name, whole in kept.items():
        layer, _, last = whole.rpartition(".")
        dtype, format = entries[whole].dtype, formats.get(layer) if last == "weight" else None
        if name == "bn.num_batches_tracked":
            continue
        if format not in (None, *EIGHT_BITS):
            raise _unknown(where, layer, f"the format {format!r}")
        if dtype not in _PLAIN:
            raise _unknown(where, whole, f"the dtype {dtype}")
        if last == "weight" and dtype in EIGHT_BITS and whole not in scales and (format is not None or marker):
            raise CheckpointError(
                f"checkpoint: {where} says of {whole} that it is scaled ({marker or format}), and holds neither "
                f"{layer}.scale_weight nor {layer}.weight_scale; its scale is lost: download it again"
            )
        if last not in ("weight", "bias", "running_mean", "running_var") and f"{layer}.weight" in entries:
            raise _unknown(where, layer, f"a tensor {last!r} beside its weight")
    return kept, scales


def read_weights(
    weights: Weights, names: Mapping[str, str], scales: Mapping[str, str], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of ``names`` one after another, with their scales multiplied in.

    Args:
        weights: the file.
        names: maps diffusers' names to the file's.
        scales: maps the file's names of scaled weights to those of their scales, from `find_scales`.
        dtype: the dtype of the result. None keeps the dtype that is stored, except that 8-bit floats become float32,
            because nothing can compute in them. Integers always stay as they are.

    Returns:
        Pairs of diffusers' name and the tensor, in the file's shape. A scale is multiplied in float32, before the
        result is rounded to ``dtype``.
    """
    import torch

    factors = dict(weights.read(scales.values()))
    places = {whole: name for name, whole in names.items()}
    for whole, tensor in weights.read(names.values()):
        if tensor.is_floating_point():
            if whole in scales:
                scale = factors[scales[whole]].to(torch.float32)
                tensor = tensor.to(torch.float32) * scale.reshape(-1, *[1] * (tensor.ndim - 1))
            wanted = torch.float32 if dtype is None and tensor.itemsize == 1 else dtype
            tensor = tensor if wanted is None else tensor.to(wanted)
        yield places[whole], tensor


def _check_scale(weight: Entry, scale: Entry, name: str, where: str) -> None:
    if weight.dtype not in EIGHT_BITS:
        raise _unknown(where, name, f"a scale of a weight that is {weight.dtype}")
    values = math.prod(scale.shape)
    by_channel = scale.shape[:1] == weight.shape[:1] and all(length == 1 for length in scale.shape[1:])
    if scale.dtype not in ("float32", "bfloat16", "float16") or not (values == 1 or by_channel):
        raise _unknown(
            where, name, f"a scale of shape {list(scale.shape)} ({scale.dtype}) of a weight {list(weight.shape)}"
        )


def _format_of(data: torch.Tensor, where: str, layer: str) -> str:
    try:
        found = json.loads(bytes(data.flatten().tolist()))
        return str(found["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise _unknown(where, f"{layer}.{_FORMAT}", "a description that is not JSON with a format") from error


def _formats_in_header(weights: Weights, where: str) -> dict[str, str]:
    text = weights.metadata.get("_quantization_metadata")
    if text is None:
        return {}
    try:
        layers = json.loads(text)["layers"]
        return {layer: one if isinstance(one, str) else str(one["format"]) for layer, one in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unknown(where, "_quantization_metadata", "a description without layers and formats") from error


def _unknown(where: str, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: {where} holds quantised weights of a kind that is not known here: {name} has {what}; expected "
        f"{', '.join(_PLAIN)}, or {' or '.join(EIGHT_BITS)} with weight_scale or scale_weight: use the VAE in "
        "bfloat16 or float32"
    )
