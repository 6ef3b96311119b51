"""What the kernels are told of a layer's weights: small records of plain numbers. This module does not import PyTorch.

A record refers to the model's own module and copies nothing, so that a model which moves between devices or dtypes
stays in step with it. Each layer kind in `layers` is made of these records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance
    from torch import nn

__all__ = ["AnyNorm", "Conv", "Linear", "Norm", "PixelNorm", "Projections", "made_precise", "parameters", "records_of"]

Record = TypeVar("Record", bound="DataclassInstance")


@dataclass(frozen=True)
class Conv:
    """A convolution: 3x3 with one zero of padding on each side, 3x3 of stride 2, or 1x1 without padding."""

    name: str
    cin: int
    cout: int
    kernel: int
    """The kernel's height and width: 3 or 1."""
    module: nn.Module
    """The module with ``weight`` and ``bias`` or None, read at each use (`parameters`). Its weight has `shape`."""
    precise: bool = False
    """Whether its rounding errors reach the result as they are, because little behind it averages them. Kernels that
    save work at the cost of larger errors save less of it then."""
    taps: int = 0
    """How many frames the module's kernel spans; 0: it knows no time. Of a causal convolution only the last tap counts
    where there is one frame, since the others see the zeros in front of it."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal parts of the module's output channels this convolution is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the module's weight."""
        return (self.cout * self.part[1], self.cin, *(self.taps,) * bool(self.taps), self.kernel, self.kernel)


@dataclass(frozen=True)
class Linear(Conv):
    """A linear layer over the channels of each pixel: a 1x1 convolution whose weight has two dimensions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the module's weight."""
        return (self.cout, self.cin)


@dataclass(frozen=True)
class Norm:
    """A GroupNorm, whose statistics are those of the whole image."""

    of_map: ClassVar[bool] = True
    """Whether it needs the statistics of the whole map before it can be applied to any of its rows."""

    name: str
    channels: int
    groups: int
    eps: float
    learned: bool
    """Whether the norm has a weight and a bias."""
    module: nn.Module


@dataclass(frozen=True)
class PixelNorm:
    """An RMS norm over the channels of each pixel: ``x / max(|x|, eps) * sqrt(channels) * weight + bias``.

    ``|x|`` is the Euclidean length of the pixel's channels.
    """

    of_map: ClassVar[bool] = False

    name: str
    channels: int
    eps: float
    biased: bool
    module: nn.Module
    """The module with ``gamma`` and, if it is ``biased``, ``bias``, each of which has ``channels`` values."""


AnyNorm: TypeAlias = "Norm | PixelNorm"


@dataclass(frozen=True)
class Projections:
    """The weights of a self-attention of one head: ``x -> (out(attend(q(x), k(x), v(x))) + input) / scale``."""

    q: Conv
    """A linear layer, or a convolution of 1x1 pixels, as the others are."""
    k: Conv
    v: Conv
    out: Conv
    softmax_scale: float
    """What the products of queries and keys are multiplied by before the softmax."""
    residual: bool
    """Whether the layer's input is added."""
    scale: float


def parameters(record: Conv | AnyNorm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias as they are now, since the record's module may have moved meanwhile.

    Returns:
        For a convolution (cout, cin, kernel, kernel) and (cout,), for a linear layer (cout, cin) and (cout,), for a
        norm (channels,) each; views of the module's own tensors. The bias may be None.
    """
    module = record.module
    if isinstance(record, PixelNorm):
        scale, shift = cast("torch.Tensor", module.gamma).detach(), cast("torch.Tensor", module.bias)
        return scale.view(-1), shift.detach().view(-1) if record.biased else None
    weight, bias = cast("torch.Tensor", module.weight).detach(), cast("torch.Tensor | None", module.bias)
    bias = None if bias is None else bias.detach()
    if isinstance(record, Conv):
        if record.taps:
            weight = weight[:, :, -1]
        which, parts = record.part
        if parts > 1:
            weight, bias = weight.chunk(parts)[which], None if bias is None else bias.chunk(parts)[which]
    return weight, bias


def made_precise(record: Record) -> Record:
    """The same layer, with every 3x3 convolution in it marked as precise."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    convs = {name: value for name, value in fields.items() if isinstance(value, Conv) and value.kernel == 3}
    return dataclasses.replace(
        record, **{name: dataclasses.replace(conv, precise=True) for name, conv in convs.items()}
    )


def records_of(record: object) -> Iterator[Conv | AnyNorm]:
    """Every convolution and norm that a layer, or any other record, is made of."""
    if isinstance(record, (Conv, Norm, PixelNorm)):
        yield record
    elif isinstance(record, tuple):
        for part in record:
            yield from records_of(part)
    elif dataclasses.is_dataclass(record):
        for field in dataclasses.fields(record):
            yield from records_of(getattr(record, field.name))
