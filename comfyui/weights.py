"""fluxvae's decoder and encoder around the weights of a VAE of ComfyUI, which keeps them and moves them as it likes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import comfy.sd

from fluxvae import Decoder, Encoder
from fluxvae.checkpoints.shared import Shared
from fluxvae.engine.plan import size_in_words
from fluxvae.errors import CheckpointError, InvalidOptionError

__all__ = ["Half", "Unsupported"]

log = logging.getLogger(__name__)

_NETWORKS = {
    "decoder": (("comfy.ldm.modules.diffusionmodules.model", "Decoder"), ("comfy.ldm.wan.vae", "Decoder3d")),
    "encoder": (("comfy.ldm.modules.diffusionmodules.model", "Encoder"), ("comfy.ldm.wan.vae", "Encoder3d")),
}
"""ComfyUI's networks that are computed here. Other networks of its own have the same names for other layers."""
_FUNCTIONS = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")
"""What ComfyUI applies to a layer's weights whenever it uses them."""


class Unsupported(Exception):
    """The VAE is of a kind that fluxvae does not compute; the message says what it is."""


class Half:
    """A decoder or an encoder that shares the weights of ComfyUI's VAE, and asks its memory manager for room.

    Args:
        kind: `fluxvae.Decoder` or `fluxvae.Encoder`.
        vae: ComfyUI's VAE. Later calls are given it again, since a node may have copied it and chosen another device.
        memory_limit: how many bytes a call may add above the loaded weights. None: what is free when it begins.

    Raises:
        Unsupported: fluxvae does not compute this VAE.
    """

    def __init__(self, kind: type[Decoder] | type[Encoder], vae: comfy.sd.VAE, memory_limit: int | None) -> None:
        self._kind, self._limit = kind, memory_limit
        _check_kind(vae.first_stage_model, kind.way.network)
        bn = getattr(vae.first_stage_model, "bn", None)
        try:
            self._shared = Shared(vae.first_stage_model, kind.way, batch_norm_eps=None if bn is None else bn.eps)
        except CheckpointError as error:
            raise Unsupported(str(error).removeprefix("checkpoint: ")) from error
        self._half: Any = None

    def needed(self, vae: comfy.sd.VAE, height: int, width: int, batch: int) -> int:
        """Return how many bytes a call for pictures of this size, in pixels, adds above the weights.

        The weights are brought to their device for this, since what a call needs depends on where it computes.
        """
        return self._planned(vae, height, width, batch)[0]

    def _planned(self, vae: comfy.sd.VAE, height: int, width: int, batch: int) -> tuple[int, str]:
        """Return what `needed` does, and the name of the kernels."""
        with self._bound(vae) as half:
            plan = half.plan(height, width, batch)
        return plan.peak_bytes + self._shared.copied(vae.device, vae.vae_dtype), plan.kernels

    @contextmanager
    def ready(self, vae: comfy.sd.VAE, height: int, width: int, batch: int) -> Iterator[Any]:
        """Yield the decoder or encoder when the memory manager has made room for pictures of this size, in pixels.

        Raises:
            FluxVAEError: the memory limit is too small, or the VAE has been changed since the node ran.
        """
        needed, kernels = self._planned(vae, height, width, batch)
        _load(vae, needed)
        with self._bound(vae) as half:
            log.info(
                "fluxvae: %ss %d x %dx%d exactly, within %s, kernels: %s",
                self._kind.way.name, batch, width, height, size_in_words(needed), kernels,
            )  # fmt: skip
            yield half

    @contextmanager
    def _bound(self, vae: comfy.sd.VAE) -> Iterator[Any]:
        """Yield the decoder or encoder with ComfyUI's weights, which have been brought to the VAE's device."""
        _refuse_functions(vae.first_stage_model)
        self._shared.check()
        _load(vae, 0)
        with self._shared.bound(vae.device, vae.vae_dtype) as module:
            if self._half is None:
                self._half = self._kind(module, memory_limit=self._limit)
            yield self._half


def _load(vae: comfy.sd.VAE, needed: int) -> None:
    """Have ComfyUI bring the weights to the VAE's device, and make room for ``needed`` more bytes there."""
    # Newer versions of ComfyUI may load weights only as they are used, and refuse to load them in full.
    dynamic = getattr(vae.patcher, "is_dynamic", lambda: False)()
    management.load_models_gpu([vae.patcher], memory_required=needed, force_full_load=not dynamic)


def _check_kind(model: Any, network: str) -> None:
    """Refuse another network than those that diffusers calls AutoencoderKL and AutoencoderKLWan, and foreign code."""
    half = getattr(model, network, None)
    if half is None or (type(half).__module__, type(half).__name__) not in _NETWORKS[network]:
        raise Unsupported(
            f"{type(model).__module__}.{type(model).__name__}; expected the VAE of FLUX.1, FLUX.2, Qwen-Image, Wan 2.1 "
            "or Stable Diffusion, or of a model that borrows one of them"
        )
    if getattr(half, "tanh_out", False) or getattr(half, "carried", False):
        raise Unsupported(f"its {network} ends in tanh, or computes the frames of a video")
    for what in _foreign(model):
        raise Unsupported(f"its {what}")


def _foreign(model: Any) -> Iterator[str]:
    """Say what is not ComfyUI's or PyTorch's: classes of modules, and functions that modules have as attributes.

    Such a function is ``optimized_attention``, which the forward of ComfyUI's attention calls. Replaced methods are
    found elsewhere (`fluxvae.engine.module_state`).
    """
    for path, module in model.named_modules():
        found = {path: type(module)}
        for name, value in vars(module).items():
            if callable(value) and not hasattr(type(module), name):
                found[f"{path}.{name}"] = value if hasattr(value, "__qualname__") else type(value)
        for name, kind in found.items():
            if (kind.__module__ or "").split(".")[0] not in ("comfy", "torch"):
                yield f"{name} is {kind.__module__}.{kind.__qualname__}, which a custom node has put there"


def _refuse_functions(model: Any) -> None:
    """Refuse foreign code, and weights that ComfyUI changes whenever it uses them: a LoRA on a VAE loaded in part."""
    for what in _foreign(model):
        raise InvalidOptionError(f"vae: its {what}, and the exact engine would pass it over; load the VAE again")
    for name, module in model.named_modules():
        for function in _FUNCTIONS:
            if getattr(module, function, None):
                raise InvalidOptionError(
                    f"vae: {name}.{function} changes weights as they are used (a LoRA, or another patch), which the "
                    "exact engine would pass over; connect the VAE without the patch, or without the fluxvae node"
                )
