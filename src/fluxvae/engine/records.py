"""What the kernels are told of a layer's weights: small records of plain numbers. This module does not import PyTorch.

A record refers to the model's own module and copies nothing, so that a model which moves between devices or dtypes
stays in step with it. Each layer kind in `layers` is made of these records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance
    from torch import nn

__all__ = ["Conv", "Linear", "Norm", "Projections", "made_precise", "parameters", "records_of"]

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
    """The module with ``weight`` (cout, cin, kernel, kernel) and ``bias`` (cout,) or None, read at each use."""
    precise: bool = False
    """Whether its rounding errors reach the result as they are, because little behind it averages them. Kernels that
    save work at the cost of larger errors save less of it then."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (self.cout, self.cin, self.kernel, self.kernel)


@dataclass(frozen=True)
class Linear(Conv):
    """A linear layer over the channels of each pixel: a 1x1 convolution whose weight has two dimensions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (self.cout, self.cin)


@dataclass(frozen=True)
class Norm:
    """A GroupNorm, whose statistics are those of the whole image."""

    name: str
    channels: int
    groups: int
    eps: float
    learned: bool
    """Whether the norm has a weight and a bias."""
    module: nn.Module


@dataclass(frozen=True)
class Projections:
    """The weights of a self-attention of one head: ``x -> (out(attend(q(x), k(x), v(x))) + input) / scale``."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    softmax_scale: float
    """What the products of queries and keys are multiplied by before the softmax."""
    residual: bool
    """Whether the layer's input is added."""
    scale: float


def parameters(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a convolution or linear layer as they are now, since its module may have moved meanwhile."""
    weight, bias = module.weight, module.bias
    return cast("torch.Tensor", weight).detach(), None if bias is None else cast("torch.Tensor", bias).detach()


def made_precise(record: Record) -> Record:
    """The same layer, with every 3x3 convolution in it marked as precise."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    convs = {name: value for name, value in fields.items() if isinstance(value, Conv) and value.kernel == 3}
    return dataclasses.replace(
        record, **{name: dataclasses.replace(conv, precise=True) for name, conv in convs.items()}
    )


def records_of(record: object) -> Iterator[Conv | Norm]:
    """Every convolution and norm that a layer, or any other record, is made of."""
    if isinstance(record, (Conv, Norm)):
        yield record
    elif isinstance(record, tuple):
        for part in record:
            yield from records_of(part)
    elif dataclasses.is_dataclass(record):
        for field in dataclasses.fields(record):
            yield from records_of(getattr(record, field.name))
