"""Weights stored as scaled 8-bit floats, and the weights they stand for: ``weight * scale``.

What the tensors beside a weight mean, by ComfyUI's ``utils.convert_old_quants`` and ``ops.mixed_precision_ops``:

    <layer>.scale_weight, <layer>.weight_scale    the factor, for the tensor or for each output channel
    <layer>.scale_input, <layer>.input_scale      of the layer's input, where it is rounded to 8 bits too: not here
    <layer>.comfy_quant                           JSON as bytes: {"format": "float8_e4m3fn", ...}
    scaled_fp8                                    the weights of this model are scaled; its dtype is theirs
    _quantization_metadata (in the header)        JSON: {"layers": {<layer>: {"format": ...}}}

8-bit floats without any of these are plain numbers. Every other kind of quantised weight is refused by its name.
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
    """Tell the decoder's tensors from what is stored beside them.

    Args:
        names: diffusers' names to the file's, of everything that the decoder's part of the file holds.
        prefix: what stands before the VAE in the file.

    Returns:
        ``names`` without scales and markers, and the file's names of weights to those of their scales.

    Raises:
        CheckpointError: weights quantised in a way that is not known here, or scales that are lost or of a wrong shape.
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
    """Read the tensors of ``names`` one by one: scales multiplied in, in ``dtype``.

    Args:
        names: diffusers' names to the file's.
        dtype: None: as stored; 8-bit floats, in which nothing computes, become float32.

    Returns:
        diffusers' names and the tensors, in the file's shape.
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
