"""The module that the weights go into: built without weights, without its encoder, and held against the tensors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fluxvae.checkpoints.entries import first_line
from fluxvae.checkpoints.layouts import Vae
from fluxvae.errors import CheckpointError

__all__ = ["COUNTS", "build_module", "check_tensors", "has_pools", "own_settings"]

COUNTS = "bn.num_batches_tracked"
"""Of training only, and often left out."""


def build_module(config: dict[str, Any], vae: Vae, where: str, *, from_config: bool) -> Any:
    """The module without weights, and without its encoder."""
    import torch

    kind = _class(config["_class_name"])
    if vae.preview:  # what diffusers writes into a preview's config itself, and then warns of
        config = {name: value for name, value in config.items() if name != "block_out_channels"}
    try:
        with own_settings(), torch.device("meta"):
            module = kind.from_config(json.loads(json.dumps(config)))
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError, ArithmeticError) as error:
        source = "config.json" if from_config else "the shapes of its tensors"
        raise CheckpointError(
            f"checkpoint: {where} cannot be built as {config['_class_name']} from {source}: {first_line(error)}; it is "
            "damaged or another model's"
        ) from error
    module.encoder = None  # never used for decoding, and nearly half of the weights
    if hasattr(module, "quant_conv"):
        module.quant_conv = None
    if has_pools(vae):
        from fluxvae.checkpoints.previews import add_pools

        with own_settings(), torch.device("meta"):
            add_pools(module)
    return module


def has_pools(vae: Vae) -> bool:
    """Whether it is TAEF2, whose blocks have a branch that diffusers' ``AutoencoderTiny`` lacks (`previews`)."""
    return vae.preview and any(".pool." in name for name in vae.names)


def check_tensors(
    kind: str,
    places: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    from_config: bool,
) -> None:
    """Every tensor must find its place, and every place a tensor; nothing is filled with random numbers or dropped.

    Args:
        kind: diffusers' class.
        places: of its decoder half, by name.
        shapes: of the checkpoint's tensors.

    Raises:
        CheckpointError: a tensor of the decoder is missing, has no place, or has another shape.
    """
    wanted = {name: shape for name, shape in places.items() if name != COUNTS}
    given = {name: shape for name, shape in shapes.items() if name != COUNTS}
    if from_config:
        source, advice = "config.json", "config and weights do not belong together"
    else:
        source, advice = "a decoder of its sizes", "it is damaged or another model's"
    if wrong := sorted(name for name in wanted.keys() & given.keys() if wanted[name] != given[name]):
        name = wrong[0]
        raise CheckpointError(
            f"checkpoint: {where} holds {len(wrong)} of the decoder's tensors in other shapes than {source} has, "
            f"{name} among them: got {list(given[name])}, expected {list(wanted[name])}; {advice}"
        )
    if missing := sorted(wanted.keys() - given.keys()):
        raise CheckpointError(
            f"checkpoint: {where} lacks {len(missing)} of the decoder's tensors, {missing[0]} among them, for which "
            f"{source} has a place; {advice}: download it again"
        )
    if unknown := sorted(given.keys() - wanted.keys()):
        raise CheckpointError(
            f"checkpoint: {where} holds {len(unknown)} of the decoder's tensors, {unknown[0]} among them, for which "
            f"{source} ({kind}) has no place; {advice}, or the network is one that is not known here"
        )


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """PyTorch's defaults for what is made within, whatever the process has set."""
    import torch

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)
