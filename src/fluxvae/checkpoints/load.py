"""Opens a checkpoint by its headers (`open_checkpoint`), and loads its decoder or its encoder (`load_vae`).

A config says which tensors there are: the one that lies beside the weights, or one that is read off the decoder's
shapes. Every tensor of the half that is wanted must have its place in that network, and every place its tensor. Only
then are that half's tensors read, one after another, and put into diffusers' module. The other half is neither read nor
kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.checkpoints.config import sizes
from fluxvae.checkpoints.entries import itemsize
from fluxvae.checkpoints.families import check_factors, known_family
from fluxvae.checkpoints.files import Weights, open_weights
from fluxvae.checkpoints.find import find
from fluxvae.checkpoints.fp8 import find_scales, read_weights
from fluxvae.checkpoints.identify import assumption, identify
from fluxvae.checkpoints.layouts import find_vae, linear_shape
from fluxvae.checkpoints.module import COUNTS, build_module, check_tensors, has_pools, own_settings
from fluxvae.checkpoints.outline import Outline, outline
from fluxvae.engine.way import DECODE, ENCODE, Way
from fluxvae.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from fluxvae.engine.network import Network
    from fluxvae.options import VAE

__all__ = ["AssumedFamilyWarning", "Checkpoint", "load_vae", "open_checkpoint", "weights_files"]

_MOST_BYTES = 16 * 2**30
"""The most memory a half may claim in float32: ten times the largest there is."""
_warned: set[tuple[Path, ...]] = set()
"""The checkpoints (by their files) that this process has already been warned of."""


class AssumedFamilyWarning(UserWarning):
    """Warns that a single file does not tell whose VAE it holds, so that one of several families was assumed."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and fit together; `load` reads the weights."""

    files: tuple[Path, ...]
    """The files that hold the weights: one file, or all shards."""
    variant: str | None
    index: Path | None
    model: str
    """The name of diffusers' class for this VAE."""
    layout: str
    """Whose names the file gives its tensors, in words; `prefix` is what stands before these names."""
    prefix: str
    config: dict[str, Any]
    """The config of the VAE: that of its config.json, or the one that its tensors and its family imply."""
    family: str | None
    """Whose VAE it is. None where its config.json or the caller's factors settle all that the family would."""
    told_by: str
    """What the config and the family were told by, in words."""
    assumed: str
    """A sentence on what was assumed and how to settle it; empty where nothing was assumed."""
    stored_dtypes: tuple[str, ...]
    """The dtypes of the half's tensors in the files, by PyTorch's names."""
    scaled: bool
    """Whether the weights are stored as 8-bit floats with scales."""
    _weights: Weights = field(repr=False)
    _names: dict[str, str] = field(repr=False)
    _scales: dict[str, str] = field(repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(repr=False)
    _outline: Outline | None = field(repr=False)
    """None where only diffusers can tell what the config means."""
    _build: Callable[[], Any] = field(repr=False)
    """Makes diffusers' module without weights, on the ``meta`` device."""

    @property
    def decoder_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the decoder's own tensors, by diffusers' names."""
        return {name: shape for name, shape in self._shapes.items() if name.startswith("decoder.")}

    @property
    def network(self) -> Network | None:
        """The half's layers, without modules. None for a preview, and where only diffusers can read the config."""
        return None if self._outline is None else self._outline.network

    @property
    def sizes(self) -> tuple[list[int], int | None]:
        """The widths of the decoder's levels, full resolution first, and the encoder's residual blocks on each level,
        None where their number differs between levels."""
        return sizes(self.config)

    @property
    def decoder_bytes(self) -> int:
        """The bytes that the decoder's own tensors take in the files."""
        entries = self._weights.entries
        return sum(
            math.prod(entries[whole].shape) * itemsize(entries[whole].dtype)
            for name, whole in self._names.items()
            if name.startswith("decoder.")
        )

    @property
    def format(self) -> Any:
        """The `LatentFormat`, which says how the latents of this VAE become raw latents."""
        from fluxvae.latents.format import LatentFormat

        config = self._module.config if self._outline is None else self._outline.config
        return LatentFormat.from_config(config, self.model)

    def warn(self, stacklevel: int = 2) -> None:
        """Warn of what was assumed, if anything was; once in a process for the same files."""
        files = tuple(path.resolve() for path in self.files)
        if self.assumed and files not in _warned:
            _warned.add(files)
            warnings.warn(f"checkpoint: {self.assumed}", AssumedFamilyWarning, stacklevel=stacklevel + 1)

    @functools.cached_property
    def _module(self) -> Any:
        return self._build()

    def empty(self, dtype: torch.dtype, device: torch.device) -> VAE:
        """Return the module that `load` returns, but with zeros for weights, which is enough for a plan."""
        import torch

        vae: VAE = self._build()
        with own_settings():
            zeros = {
                name: torch.empty(
                    tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device
                ).zero_()  # written to, so that the zeros really take the memory that the weights will take
                for name, tensor in vae.state_dict().items()
            }
            vae.load_state_dict(zeros, strict=True, assign=True)
            return vae.eval().requires_grad_(False)

    def load(self, dtype: torch.dtype | None = None) -> VAE:
        """Read the weights into the module. Every call fills and returns the same module.

        Args:
            dtype: the dtype of the weights. None keeps the dtype that is stored, or float32 where they are stored as
                8-bit floats.

        Returns:
            The half that was asked for, on the CPU, in evaluation mode, without gradients. The settings of the process
            (default dtype and device, inference mode) have no influence on it.

        Raises:
            CheckpointError: the files have changed since they were opened.
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
    """Load one half of a VAE, on the CPU, in evaluation mode, without gradients.

    Args:
        source, options: as for `open_checkpoint`.
        dtype: the dtype of the weights. None keeps the dtype that is stored, or float32 for 8-bit floats.

    Raises:
        CheckpointError, InvalidOptionError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source, **options)
    checkpoint.warn()
    return checkpoint.load(dtype)


def weights_files(
    source: str | Path, *, subfolder: str | None = None, revision: str | None = None, variant: str | None = None
) -> tuple[Path, ...]:
    """Return the files whose weights `load_vae` loads, all shards included. A checkpoint's hash is computed from them.

    Raises:
        CheckpointError, InvalidOptionError: as for `open_checkpoint`, as far as finding the files goes; none is opened.
    """
    return find(source, subfolder=subfolder, revision=revision, variant=variant).files


def open_checkpoint(
    source: str | Path,
    *,
    way: Way = DECODE,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    family: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    batch_norm_eps: float | None = None,
) -> Checkpoint:
    """Find a checkpoint and read its headers. Whatever is wrong with the checkpoint is found here, before it is loaded.

    Args:
        source: ``"demo"``; a diffusers VAE folder, its ``config.json``, its weights file or its index; a pipeline
            folder; a folder that holds one VAE's file; a single file, safetensors or ``torch.save``'s, with diffusers'
            or BFL's names behind any prefix, of a VAE or of everything; the folder of a repository in the hub's cache;
            or a hub id ``"owner/name"``, downloaded once into that cache.
        way: which half is wanted. A source is recognised by its decoder either way.
        subfolder: where in the folder or repository the VAE lies. A subfolder ``vae`` is found without it.
        revision: the branch, tag or commit of a hub id, or of a folder in the hub's cache.
        variant: which of several variants of the weights in a folder or repository is meant, such as ``"fp16"``. Left
            out, it is the weights without a variant, or the only variant where there are none without.
        family: whose VAE a single file holds, one of `families.FAMILIES`. For a folder, the family's factors replace
            those of its config.
        scaling_factor, shift_factor, batch_norm_eps: the factors of the latents, instead of the family's or the
            config's.

    Raises:
        CheckpointError: there is nothing at the source, or what is there is damaged, another model's, or out of reach.
        InvalidOptionError: an option means nothing for this source, or the family does not fit the tensors.
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
    vae = dataclasses.replace(vae, names=names, shapes=shapes)
    if way == ENCODE:
        if not vae.encoder:
            raise CheckpointError(
                f"checkpoint: {where} holds a decoder only, and pictures are encoded by an encoder; pass the file, or "
                "the folder, of the whole VAE"
            )
        names, scales = find_scales(weights, vae.encoder, vae.prefix, where)
        shapes = {name: linear_shape(name, weights.entries[whole].shape) for name, whole in names.items()}
    _check_size(shapes, where, way)
    config, choice, told_by = identify(found, weights, vae, named, given, where)
    from_config = found.config is not None

    def build() -> Any:
        module = build_module(config, vae, where, way, from_config=from_config)
        places = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        check_tensors(type(module).__name__, places, shapes, where, way, from_config=from_config)
        return module

    known = outline(config, way, pools=has_pools(vae, way))
    if known is None:
        build()
    else:
        check_tensors(config["_class_name"], known.shapes, shapes, where, way, from_config=from_config)
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


def _check_size(shapes: dict[str, tuple[int, ...]], where: str, way: Way) -> None:
    values = sum(math.prod(shape) for shape in shapes.values())
    if 4 * values > _MOST_BYTES:
        raise CheckpointError(
            f"checkpoint: {where} claims {values} values for its {way.network}; expected at most {_MOST_BYTES // 4}: "
            "it is damaged or another kind of model"
        )
