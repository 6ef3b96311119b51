"""A checkpoint opened by its headers (`open_checkpoint`), and its decoder loaded (`load_vae`).

The module is built without weights from a config, the one that lies beside the weights or one that is read off their
shapes, and every tensor of the decoder must find its place in it, and every place a tensor. Only then are the
decoder's tensors read, one after another, and put there. The encoder is neither read nor kept.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.checkpoints.entries import itemsize
from fluxvae.checkpoints.families import check_factors, known_family
from fluxvae.checkpoints.files import Weights, open_weights
from fluxvae.checkpoints.find import find
from fluxvae.checkpoints.fp8 import find_scales, read_weights
from fluxvae.checkpoints.identify import assumption, identify
from fluxvae.checkpoints.layouts import Vae, find_vae, linear_shape
from fluxvae.checkpoints.module import COUNTS, build_module, check_tensors, has_pools, own_settings
from fluxvae.checkpoints.outline import Outline, outline
from fluxvae.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from fluxvae.decoder_options import VAE
    from fluxvae.engine.records import Network

__all__ = ["AssumedFamilyWarning", "Checkpoint", "load_vae", "open_checkpoint", "weights_files"]

_MOST_BYTES = 16 * 2**30
"""Of a decoder: ten times the largest there is."""
_warned: set[tuple[Path, ...]] = set()


class AssumedFamilyWarning(UserWarning):
    """A single file does not tell whose VAE it holds, and one of several families was assumed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read and fit together; `load` reads the weights."""

    files: tuple[Path, ...]
    """One file, or all shards."""
    variant: str | None
    index: Path | None
    model: str
    """diffusers' class."""
    layout: str
    """Of its tensors' names, in words; what stands before them is `prefix`."""
    prefix: str
    config: dict[str, Any]
    """Of the VAE: its config.json's, or what its tensors and its family say."""
    family: str | None
    """Whose VAE it is; None: its config.json or the caller's factors say all that matters, and no family."""
    told_by: str
    """What says so, in words."""
    assumed: str
    """What was assumed, in a sentence, and what to do; empty: nothing was."""
    stored_dtypes: tuple[str, ...]
    scaled: bool
    """8-bit floats with scales."""
    _weights: Weights = field(repr=False)
    _names: dict[str, str] = field(repr=False)
    _scales: dict[str, str] = field(repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(repr=False)
    _outline: Outline | None = field(repr=False)
    """None: only diffusers can tell what the config means."""
    _build: Callable[[], Any] = field(repr=False)
    """Makes diffusers' module, on the ``meta`` device."""

    @property
    def decoder_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the decoder's own tensors, by diffusers' names."""
        return {name: shape for name, shape in self._shapes.items() if name.startswith("decoder.")}

    @property
    def network(self) -> Network | None:
        """Its layers, without modules; None: a preview, or a config of which only diffusers knows everything."""
        return None if self._outline is None else self._outline.network

    @property
    def decoder_bytes(self) -> int:
        """Of the decoder's own tensors, as stored."""
        entries = self._weights.entries
        return sum(
            math.prod(entries[whole].shape) * itemsize(entries[whole].dtype)
            for name, whole in self._names.items()
            if name.startswith("decoder.")
        )

    @property
    def format(self) -> Any:
        """`LatentFormat`: how its latents become raw latents."""
        from fluxvae.latents import LatentFormat

        config = self._module.config if self._outline is None else self._outline.config
        return LatentFormat.from_config(config, self.model)

    def warn(self, stacklevel: int = 2) -> None:
        """Say what was assumed, once for these files in this process."""
        files = tuple(path.resolve() for path in self.files)
        if self.assumed and files not in _warned:
            _warned.add(files)
            warnings.warn(f"checkpoint: {self.assumed}", AssumedFamilyWarning, stacklevel=stacklevel + 1)

    @functools.cached_property
    def _module(self) -> Any:
        return self._build()

    def empty(self, dtype: torch.dtype, device: torch.device) -> VAE:
        """What `load` gives, with zeros for weights: enough for a plan."""
        import torch

        vae: VAE = self._build()
        with own_settings():
            zeros = {
                name: torch.empty(
                    tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device
                ).zero_()  # written, so that they take the memory that the weights take
                for name, tensor in vae.state_dict().items()
            }
            vae.load_state_dict(zeros, strict=True, assign=True)
            return vae.eval().requires_grad_(False)

    def load(self, dtype: torch.dtype | None = None) -> VAE:
        """Read the decoder's weights; every call fills and returns the same module.

        Args:
            dtype: of the weights; None: as stored, or float32 where they are 8-bit floats.

        Returns:
            The decoder half, on the CPU, in evaluation mode, without gradients. Nothing of the process's settings
            (default dtype and device, inference mode) plays a part.

        Raises:
            CheckpointError: the files changed meanwhile.
        """
        import torch

        vae: VAE = self._module
        with own_settings():
            tensors = {
                name: tensor.reshape(linear_shape(name, tuple(tensor.shape)))
                for name, tensor in read_weights(self._weights, self._names, self._scales, dtype)
            }
            if COUNTS in vae.state_dict():
                tensors.setdefault(COUNTS, torch.tensor(0, dtype=torch.int64, device="cpu"))
            vae.load_state_dict(tensors, strict=True, assign=True)
            return vae.eval().requires_grad_(False)


def load_vae(source: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> VAE:
    """Load the decoder half of a VAE, on the CPU, in evaluation mode, without gradients.

    Args:
        source, options: as for `open_checkpoint`.
        dtype: of the weights; as stored where left out.

    Raises:
        CheckpointError, InvalidOptionError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source, **options)
    checkpoint.warn()
    return checkpoint.load(dtype)


def weights_files(
    source: str | Path, *, subfolder: str | None = None, revision: str | None = None, variant: str | None = None
) -> tuple[Path, ...]:
    """The files whose weights `load_vae` loads, all shards: what a checkpoint's hash is of.

    Raises:
        CheckpointError, InvalidOptionError: as `open_checkpoint`, of the files alone.
    """
    return find(source, subfolder=subfolder, revision=revision, variant=variant).files


def open_checkpoint(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    family: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    batch_norm_eps: float | None = None,
) -> Checkpoint:
    """Find a checkpoint and read its headers: everything that can be wrong with it is found here.

    Args:
        source: ``"demo"``; a diffusers VAE folder, its ``config.json``, its weights file or its index; a pipeline
            folder; a folder that holds one VAE's file; a single file, safetensors or ``torch.save``'s, with diffusers'
            or BFL's names behind any prefix, of a VAE or of everything; the folder of a repository in the hub's cache;
            or a hub id ``"owner/name"``, downloaded once into that cache.
        subfolder: where in the folder or repository the VAE lies; found by itself where it is ``vae``.
        revision: branch, tag or commit; for hub ids only.
        variant: ``"fp16"``: of a folder or repository that has several; left out, the weights without a variant, or
            the only one.
        family: whose VAE a single file holds, one of `families.FAMILIES`; instead of what its config says, of a folder.
        scaling_factor, shift_factor, batch_norm_eps: of its latents, instead of its family's or its config's.

    Raises:
        CheckpointError: nothing there, damaged, another model's, or out of reach.
        InvalidOptionError: an option that means nothing here, or a family that does not fit the tensors.
    """
    named = None if family is None else known_family(family)
    given = check_factors(
        {"scaling_factor": scaling_factor, "shift_factor": shift_factor, "batch_norm_eps": batch_norm_eps}
    )
    found = find(source, subfolder=subfolder, revision=revision, variant=variant)
    weights = open_weights(found.files)
    where = str(found.name)
    vae = find_vae(weights.entries, where)
    names, scales = find_scales(weights, vae.names, vae.prefix, where)
    shapes = {name: vae.shapes[name] for name in names}
    vae = Vae(vae.prefix, vae.preview, vae.layout, names, shapes, vae.encoder_widths)
    _check_size(shapes, where)
    config, choice, told_by = identify(found, weights, vae, named, given, where)
    from_config = found.config is not None

    def build() -> Any:
        module = build_module(config, vae, where, from_config=from_config)
        places = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        check_tensors(type(module).__name__, places, shapes, where, from_config=from_config)
        return module

    known = outline(config, pools=has_pools(vae))
    if known is None:
        build()
    else:
        check_tensors(config["_class_name"], known.shapes, shapes, where, from_config=from_config)
    return Checkpoint(
        files=found.files,
        variant=found.variant,
        index=found.index,
        model=config["_class_name"],
        layout=vae.layout,
        prefix=vae.prefix,
        config=config,
        family=None if choice is None or choice.family is None else choice.family.name,
        told_by=told_by,
        assumed=assumption(choice, vae, where),
        stored_dtypes=tuple(sorted({weights.entries[whole].dtype for name, whole in names.items() if name != COUNTS})),
        scaled=bool(scales),
        _weights=weights,
        _names=dict(names),
        _scales=scales,
        _shapes=shapes,
        _outline=known,
        _build=build,
    )


def _check_size(shapes: dict[str, tuple[int, ...]], where: str) -> None:
    values = sum(math.prod(shape) for shape in shapes.values())
    if 4 * values > _MOST_BYTES:
        raise CheckpointError(
            f"checkpoint: {where} claims a decoder of {values} values; expected at most {_MOST_BYTES // 4}: it is "
            "damaged or another kind of model"
        )
