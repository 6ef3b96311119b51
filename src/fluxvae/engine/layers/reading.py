"""Reads diffusers' and PyTorch's modules into records; what is not understood exactly is refused by name.

An engine that guessed would make a silently wrong image. Importing this module does not import PyTorch.
"""

from __future__ import annotations

from typing import Any, NoReturn

from fluxvae.engine.records import Conv, Linear, Norm
from fluxvae.errors import InvalidOptionError

__all__ = ["OWN", "conv", "expect", "is_of", "linear", "no_dropout", "norm", "refuse", "silu", "unwrapped"]

OWN = "diffusers."
"""Where the classes of a VAE come from that are not PyTorch's."""


def unwrapped(module: Any) -> Any:
    """The module that ``torch.compile(module)`` was given; any other as it is."""
    while type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]
    return module


def is_of(module: object, name: str) -> bool:
    """Whether the class itself is PyTorch's or diffusers' of this name.

    A subclass computes something else, and so does another library's class of the same name (peft's adapters are
    called Conv2d and Linear too).
    """
    import torch

    kind = type(module)
    if hasattr(torch.nn, name):
        return kind is getattr(torch.nn, name)
    return kind.__name__ == name and kind.__module__.startswith(OWN)


def refuse(name: str, module: object, expected: str) -> NoReturn:
    """Raise InvalidOptionError: the module called ``name`` is not what was expected of it."""
    raise InvalidOptionError(
        f"engine: the exact engine cannot read {name} ({type(module).__name__}); it expected {expected}. "
        "Use engine='diffusers' for this model."
    )


def expect(name: str, module: Any, *types: str) -> Any:
    """The module without what ``torch.compile`` wrapped around it, if it is of one of these types; else refuse it."""
    module = unwrapped(module)
    if not any(is_of(module, name) for name in types):
        refuse(name, module, " or ".join(types))
    return module


def conv(name: str, module: Any, kernel: int, *, stride: int = 1) -> Conv:
    """Read a convolution, ``kernel`` pixels high and wide.

    Args:
        stride: 1 for a convolution that keeps the map's size; another for one without padding of its own.
    """
    module = expect(name, module, "Conv2d")
    pad = kernel // 2 if stride == 1 else 0
    settings = (module.kernel_size, module.stride, module.dilation, module.groups, module.padding_mode)
    if settings != ((kernel, kernel), (stride, stride), (1, 1), 1, "zeros") or tuple(module.padding) != (pad, pad):
        refuse(name, module, f"{kernel}x{kernel}, stride {stride}, zero padding {pad}, one group")
    return Conv(name, module.in_channels, module.out_channels, kernel, module)


def linear(name: str, module: Any) -> Linear:
    """Read a linear layer."""
    module = expect(name, module, "Linear")
    return Linear(name, module.in_features, module.out_features, 1, module)


def norm(name: str, module: Any) -> Norm:
    """Read a GroupNorm."""
    module = expect(name, module, "GroupNorm")
    return Norm(name, module.num_channels, module.num_groups, module.eps, bool(module.affine), module)


def silu(name: str, module: Any) -> None:
    """Refuse any other activation than SiLU."""
    expect(name, module, "SiLU")


def no_dropout(name: str, module: Any) -> None:
    """Refuse a dropout that would drop anything."""
    module = expect(name, module, "Dropout", "Identity")
    if is_of(module, "Dropout") and module.training and module.p > 0:
        refuse(name, module, "a model in evaluation mode (call vae.eval())")
