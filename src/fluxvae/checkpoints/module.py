"""Builds the half of diffusers' module that the weights go into, and compares its tensors with the file's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fluxvae.checkpoints.layouts import Vae
from fluxvae.engine.way import DECODE, ENCODE, Way
from fluxvae.errors import CheckpointError, first_line

__all__ = ["COUNTS", "build_module", "check_tensors", "has_pools", "own_settings"]

COUNTS = "bn.num_batches_tracked"
"""The counter of a BatchNorm. Only training uses it, and checkpoints often leave it out, so nobody has to have it."""


def build_module(config: dict[str, Any], vae: Vae, where: str, way: Way, *, from_config: bool) -> Any:
    """Build the module on the ``meta`` device, so without weights, and without the half that does not go ``way``.

    Args:
        config: the config of the VAE.
        vae: the VAE as `find_vae` found it.
        where: the checkpoint, for messages.
        from_config: the config is a config.json's; otherwise it was read off the shapes. For messages.

    Raises:
        CheckpointError: diffusers cannot build a module from this config.
    """
    import torch

    kind = _class(config["_class_name"])
    if vae.preview:  # diffusers adds this to a preview's config itself, and warns of it when it reads the config again
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
    for part in (ENCODE if way == DECODE else DECODE).parts:  # never used, and about half of the weights
        if hasattr(module, part):
            setattr(module, part, None)
    if has_pools(vae, way):
        from fluxvae.checkpoints.previews import add_pools

        with own_settings(), torch.device("meta"):
            add_pools(module, way)
    return module


def has_pools(vae: Vae, way: Way) -> bool:
    """Return whether this is TAEF2, whose blocks have a branch that ``AutoencoderTiny`` lacks (see `previews`)."""
    return vae.preview and any(".pool." in name for name in (vae.names if way == DECODE else vae.encoder))


def check_tensors(
    kind: str,
    places: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    way: Way,
    *,
    from_config: bool,
) -> None:
    """Check that every tensor has a place in the network, and that every place has a tensor.

    So no place is left with random numbers, and no tensor is dropped: either would give a wrong image without an error.

    Args:
        kind: the name of diffusers' class.
        places: the shapes of the tensors in the half of it that goes ``way``, by name.
        shapes: the shapes of the checkpoint's tensors, by diffusers' names.
        where: the checkpoint, for messages.
        from_config: the places come from a config.json; otherwise from the shapes themselves. For messages.

    Raises:
        CheckpointError: a tensor of that half is missing, has no place, or has another shape.
    """
    wanted = {name: shape for name, shape in places.items() if name != COUNTS}
    given = {name: shape for name, shape in shapes.items() if name != COUNTS}
    half, of = way.network, "a decoder" if way == DECODE else "an encoder"
    if from_config:
        source, advice = "config.json", "config and weights do not belong together"
    else:
        source, advice = f"{of} of its sizes", "it is damaged or another model's"
    if wrong := sorted(name for name in wanted.keys() & given.keys() if wanted[name] != given[name]):
        name = wrong[0]
        raise CheckpointError(
            f"checkpoint: {where} holds {len(wrong)} of the {half}'s tensors in other shapes than {source} has, "
            f"{name} among them: got {list(given[name])}, expected {list(wanted[name])}; {advice}"
        )
    if missing := sorted(wanted.keys() - given.keys()):
        raise CheckpointError(
            f"checkpoint: {where} lacks {len(missing)} of the {half}'s tensors, {missing[0]} among them, for which "
            f"{source} has a place; {advice}: download it again"
        )
    if unknown := sorted(given.keys() - wanted.keys()):
        raise CheckpointError(
            f"checkpoint: {where} holds {len(unknown)} of the {half}'s tensors, {unknown[0]} among them, for which "
            f"{source} ({kind}) has no place; {advice}, or the network is one that is not known here"
        )


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Build modules and tensors by PyTorch's own defaults within this context, whatever the process has set.

    What a process may have set is the default dtype, the default device, inference mode and the recording of gradients.
    """
    import torch

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)
