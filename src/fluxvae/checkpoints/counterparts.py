"""Compares the layers of a VAE that another program holds with diffusers' layers for the same weights.

Weights do not say everything: a convolution has a stride and a padding, a norm has an eps, and between layers with
weights there are layers without any. Something may have changed them since the other program built its network, and
the exact engine, which has the weights alone, would not notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from fluxvae.checkpoints import wan
from fluxvae.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["check_layers_without_weights", "check_settings"]

_CONVOLUTION = ("kernel_size", "stride", "dilation", "groups", "padding_mode")
_GROUP_NORM = ("num_groups", "num_channels", "eps")
_PIXEL_NORM = ("channel_first", "scale")
_RESAMPLING = ("mode",)
_SETTINGS = (*_CONVOLUTION, *_GROUP_NORM, *_PIXEL_NORM, *_RESAMPLING)
"""What layers compute besides what their weights say. A convolution's padding is compared by `_zeros_around`."""

_POINTWISE = {"stride": (1, 1), "padding": (0, 0, 0, 0), "groups": 1}
"""What is expected of a 1x1 convolution that stands for a linear layer."""


def check_settings(theirs: torch.nn.Module, ours: torch.nn.Module, names: Mapping[str, str], where: str) -> None:
    """Compare the settings of the layers that have weights, and of the resamplings that these are in.

    Args:
        theirs, ours: the other program's VAE, and diffusers' with the same sizes.
        names: maps the names of diffusers' tensors to the other's.
        where: the other VAE, for messages.

    Raises:
        CheckpointError: one of the other's layers is gone, or has another setting than diffusers' has.
    """
    pairs = {name.rpartition(".")[0]: whole.rpartition(".")[0] for name, whole in names.items()}
    end = ".resample.1"
    around = {name.removesuffix(end): whole.removesuffix(end) for name, whole in pairs.items() if name.endswith(end)}
    for name, whole in (pairs | around).items():
        its, expected = _settings(_layer(theirs, whole, where)), _settings(ours.get_submodule(name))
        if "kernel_size" in its and "kernel_size" not in expected:
            expected = _POINTWISE
        for setting, value in expected.items():
            _compare(whole, setting, its.get(setting), value, where)


def check_layers_without_weights(
    theirs: torch.nn.Module, parts: Iterable[str], names: Iterable[str], where: str
) -> None:
    """Compare the layers without weights of a network that is a tree of modules, as Wan's is.

    In diffusers' and BFL's networks they are calls of functions, which nobody can exchange in one instance.

    Args:
        theirs: the other program's VAE.
        parts: the names of its modules that are looked at.
        names: those of the tensors in these modules, by Wan's names.
        where: the VAE, for messages.

    Raises:
        CheckpointError: one of these layers is of another class, has another setting, is gone, or is one too many.
    """
    import torch

    expected = wan.layers_without_weights(names)
    for path, (kind, settings) in expected.items():
        layer = _layer(theirs, path, where)
        if type(layer) is not getattr(torch.nn, kind):
            _refuse(path, f"is a {type(layer).__name__}; expected {kind}", where)
        for setting, value in settings.items():
            _compare(path, setting, getattr(layer, setting, None), value, where)
    for part in parts:
        for path, layer in theirs.get_submodule(part).named_modules(prefix=part):
            if path not in expected and next(layer.children(), None) is None and not layer.state_dict():
                _refuse(path, f"is a {type(layer).__name__}; expected no such layer", where)


def _settings(layer: Any) -> dict[str, Any]:
    found = {name: getattr(layer, name) for name in _SETTINGS if hasattr(layer, name)}
    if "kernel_size" in found:
        found["padding"] = _zeros_around(layer)
    if "channel_first" in found:  # where such a norm has no bias, diffusers has 0.0 there, and ComfyUI None
        bias = getattr(layer, "bias", None)
        found["bias"] = 0.0 if bias is None else bias
    return found


def _zeros_around(conv: Any) -> Any:
    """Return how many zeros a convolution sees around a map: left, right, above, below, and in time before and after.

    A causal convolution has its own attribute ``_padding``: in diffusers' and older ComfyUI's these six numbers, in
    newer ComfyUI's the frames before the first alone. Anything else comes back as it is.
    """
    own, causal = conv.padding, getattr(conv, "_padding", 0)
    if isinstance(causal, int) and not isinstance(own, str):
        causal = (0, 0, 0, 0, causal, 0)[: 2 * len(own)]
    if isinstance(own, str) or not isinstance(causal, (tuple, list)) or len(causal) != 2 * len(own):
        return own, causal
    return tuple(zeros + own[-1 - index // 2] for index, zeros in enumerate(causal))


def _layer(model: torch.nn.Module, path: str, where: str) -> torch.nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        _refuse(path, "is gone", where)


def _compare(path: str, setting: str, got: object, value: object, where: str) -> None:
    if got != value:
        _refuse(path, f"has {setting} {got!r}; expected {value!r}", where)


def _refuse(path: str, what: str, where: str) -> NoReturn:
    raise CheckpointError(
        f"checkpoint: {path} of {where} {what}: something has changed it, or it is another network; load the VAE again"
    )
