"""`install` makes any diffusers pipeline that holds an ``AutoencoderKL`` decode exactly and in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.engine.plan import parse_memory_limit
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:  # elsewhere they are imported inside the functions, so that `import fluxvae` does not import them
    import torch
    from diffusers import AutoencoderKL

    from fluxvae.engine.exact import ExactEngine

__all__ = ["Installed", "install"]


class Installed:
    """The handle of an `install`: `remove` undoes it, and so does leaving a ``with`` block of the handle."""

    def __init__(self, vae: AutoencoderKL, engine: ExactEngine) -> None:
        import torch

        self.vae = vae
        self.engine = engine
        # torch.compile must not trace our decode when code around it is compiled: tracing would take minutes or fail.
        # This is not done by a decorator, because a decorator would import PyTorch together with this module.
        if not hasattr(Installed._exact_decode, "_torchdynamo_orig_callable"):
            Installed._exact_decode = torch.compiler.disable(Installed._exact_decode)  # type: ignore[method-assign, no-untyped-call]
        self._decode = self._exact_decode
        vae._decode = self._decode

    def remove(self) -> None:
        """Undo `install`. A second call does nothing.

        Raises:
            InvalidOptionError: something else has replaced ``vae._decode`` since; that must be undone first.
        """
        mine = self.vae.__dict__.get("_decode")
        if mine is None:
            return
        if mine is not self._decode:
            raise InvalidOptionError(
                f"vae: got a _decode that fluxvae.install did not put there ({mine!r}); undo that replacement first"
            )
        del self.vae._decode

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _exact_decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """Replace ``AutoencoderKL._decode``: decode raw latents (B, C, lh, lw) to (B, 3, H, W) with the exact engine.

        ``vae.decode`` calls this method, and its own hooks, slicing and return types stay as they are.
        """
        import torch
        from diffusers.models.autoencoders.vae import DecoderOutput

        from fluxvae.latents.values import plain

        if self.vae.use_tiling:
            raise InvalidOptionError(
                "use_tiling: got True; tiles are blended, not exact, and fluxvae.install bounds memory without them; "
                "call vae.disable_tiling() (pipe.disable_vae_tiling()), or handle.remove() to tile"
            )
        if torch.is_grad_enabled() and (z.requires_grad or any(p.requires_grad for p in self._trainable())):
            raise InvalidOptionError(
                "vae: got a decode that records gradients, which the exact engine does not; decode under "
                "torch.no_grad(), or call handle.remove() to train"
            )
        sample = self.engine.decode(plain(z))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _trainable(self) -> list[torch.nn.Parameter]:
        # Every parameter of a model fresh from from_pretrained has requires_grad, so only the training mode shows that
        # gradients are really wanted.
        return list(self.vae.decoder.parameters()) if self.vae.training else []


def install(
    vae: AutoencoderKL,
    *,
    memory_limit: int | str | None = None,
    spill_dir: str | Path | None = None,
    kernels: str = "auto",
) -> Installed:
    """Make ``vae.decode`` exact and bounded in memory, in place, for whatever pipeline holds the VAE.

    Only ``vae._decode`` is replaced. Offload hooks on ``decode`` run as before, ``return_dict`` and slicing work as
    before (slicing saves nothing, because images are decoded one by one anyway), and ``vae.encode`` is not touched.

    Args:
        vae: the pipeline's VAE, ``pipe.vae``.
        memory_limit: the bytes that a decode may add above the loaded weights, as a number or as a text such as
            ``"4GiB"``. None allows what is free.
        spill_dir: the folder for feature maps that memory has no room for.
        kernels: as for `fluxvae.Decoder`.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        InvalidOptionError: an option is unknown, the engine cannot read this VAE, tiling is switched on, or this VAE
            has been installed into already. If tiling is switched on later, the next decode raises this error.
    """
    from fluxvae.engine.exact import ExactEngine
    from fluxvae.engine.layers.reading import unwrapped

    vae = unwrapped(vae)
    if "_decode" in vae.__dict__:
        raise InvalidOptionError(
            "vae: its _decode has been replaced already; call remove() on the handle of the first install"
        )
    if getattr(vae, "use_tiling", False):
        raise InvalidOptionError(
            "use_tiling: got True; tiles are blended, not exact; call vae.disable_tiling() before fluxvae.install"
        )
    limit = None if memory_limit is None else parse_memory_limit(memory_limit)
    return Installed(vae, ExactEngine(vae, kernels=kernels, memory_limit=limit, spill_dir=spill_dir))
