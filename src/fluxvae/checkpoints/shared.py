"""A VAE that another program holds in memory, in BFL's or Wan's layout, as diffusers' module with the same weights.

ComfyUI, and BFL's and Wan's own code, build the networks that diffusers builds too, but name their parts as BFL or Wan
does. `Shared` builds diffusers' module without weights, and `Shared.bound` lends it the other module's weights for the
time of a call. No weight is held twice: diffusers' module refers to the same memory, and afterwards to nothing, so that
the other program may move its weights or free them between calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fluxvae.checkpoints.config import config_of_shapes, describe
from fluxvae.checkpoints.counterparts import check_layers_without_weights, check_settings
from fluxvae.checkpoints.entries import Entry
from fluxvae.checkpoints.layouts import find_vae, linear_shape
from fluxvae.checkpoints.module import COUNTS, build_module, check_tensors, own_settings
from fluxvae.engine.way import DECODE, Way
from fluxvae.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from fluxvae.options import VAE

__all__ = ["Shared"]

_WHERE = "the VAE in memory"


class Shared:
    """One half of another program's VAE as diffusers' module.

    Args:
        model: the other module, whose parts have BFL's names or Wan's. It is read at every call of `bound`, and never
            changed.
        way: which half is wanted.
        batch_norm_eps: what is added to FLUX.2's variances, which no tensor says.

    Raises:
        CheckpointError: the module is no VAE of this kind, or a part of it has other settings than diffusers' has (a
            convolution that wraps around, for example, as nodes for seamless tiling make it).
    """

    def __init__(self, model: torch.nn.Module, way: Way, *, batch_norm_eps: float | None = None) -> None:
        self._model, self._lock = model, threading.Lock()
        entries = {
            name: Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), Path())
            for name, tensor in model.state_dict().items()
        }
        found = find_vae(entries, _WHERE)
        if found.preview:
            raise CheckpointError(f"checkpoint: {_WHERE} is {describe(found)}; expected a full VAE")
        config, families = config_of_shapes(found, _WHERE)
        if families:
            config |= families[0].config  # of several the first: they differ in the factors of their latents alone
        if batch_norm_eps is not None:
            config["batch_norm_eps"] = batch_norm_eps
        names = found.names if way == DECODE else found.encoder
        if not names:
            raise CheckpointError(f"checkpoint: {_WHERE} has no {way.network}")
        self._names = {name: whole for name, whole in names.items() if name != COUNTS}
        self._parts = sorted({whole.split(".")[0] for whole in self._names.values()})
        self._frames = found.frames
        self.vae: VAE = build_module(config, found, _WHERE, way, from_config=False)
        """diffusers' module. It has weights within `bound` only."""
        self.vae.eval().requires_grad_(False)
        self._empty = dict(self.vae.state_dict())
        places = {name: tuple(tensor.shape) for name, tensor in self._empty.items()}
        shapes = {name: linear_shape(name, entries[whole].shape) for name, whole in self._names.items()}
        check_tensors(type(self.vae).__name__, places, shapes, _WHERE, way, from_config=False)
        self.check()

    def check(self) -> None:
        """Refuse what makes the other module compute something else than its weights say; it may have come since.

        Raises:
            CheckpointError: a setting of a layer differs from diffusers', a layer is gone, or there is a hook or a
                replaced method.
        """
        from fluxvae.engine.module_state import changed_calls, changed_methods  # here, because it brings PyTorch

        for changes in (changed_methods(self._model), changed_calls(self._model, self._parts)):
            for what, do in changes:
                raise CheckpointError(f"checkpoint: in {_WHERE}, {what}; the exact engine would pass it over. {do}")
        check_settings(self._model, self.vae, self._names, _WHERE)
        if self._frames:
            check_layers_without_weights(self._model, self._parts, self._names.values(), _WHERE)

    @contextmanager
    def bound(self, device: torch.device, dtype: torch.dtype) -> Iterator[VAE]:
        """Lend diffusers' module the weights as they are now.

        Weights that are elsewhere, or in another dtype, are copied for the time of this context: `copied` says how many
        bytes that takes.

        Args:
            device, dtype: where and in which dtype the module is to have them.

        Raises:
            CheckpointError: a weight is no plain tensor (quantised), or holds no values.
        """
        with self._lock:
            try:
                with own_settings():
                    self.vae.load_state_dict(self._tensors(device, dtype), strict=True, assign=True)
                yield self.vae.requires_grad_(False)
            finally:
                with own_settings():
                    self.vae.load_state_dict(self._empty, strict=True, assign=True)

    def copied(self, device: torch.device, dtype: torch.dtype) -> int:
        """Return how many bytes of weights `bound` would copy to this device and dtype; the others are shared."""
        return sum(
            tensor.numel() * dtype.itemsize
            for tensor in self._plain().values()
            if (tensor.device, tensor.dtype) != (device, dtype)
        )

    def _tensors(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = {
            name: tensor.to(device=device, dtype=dtype).reshape(linear_shape(name, tuple(tensor.shape)))
            for name, tensor in self._plain().items()
        }
        if COUNTS in self._empty:
            import torch

            found[COUNTS] = torch.tensor(0, dtype=torch.int64, device=device)
        return found

    def _plain(self) -> Mapping[str, torch.Tensor]:
        import torch

        state: Mapping[str, torch.Tensor] = self._model.state_dict()
        for whole in self._names.values():
            tensor = state.get(whole)
            if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
                what = "is gone" if tensor is None else f"is a {type(tensor).__name__}"
                what = "is on the meta device, which holds no values" if tensor is not None and tensor.is_meta else what
                raise CheckpointError(f"checkpoint: {whole} of {_WHERE} {what}; expected a plain tensor: load it again")
        return {name: state[whole] for name, whole in self._names.items()}
