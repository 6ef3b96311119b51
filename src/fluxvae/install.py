"""`install`: exact decoding inside any diffusers pipeline that holds an ``AutoencoderKL``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.engine.plan import parse_memory_limit
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:  # and inside the functions: `import fluxvae` does without PyTorch and diffusers
    import torch
    from diffusers import AutoencoderKL

    from fluxvae.engine.exact import ExactEngine

__all__ = ["Installed", "install"]


class Installed:
    """What `install` put into a VAE; `remove` takes it out again. Also a context manager."""

    def __init__(self, vae: AutoencoderKL, engine: ExactEngine) -> None:
        import torch

        self.vae = vae
        self.engine = engine
        # Code that is compiled around a decode calls ours as it is: tracing it would take minutes or fail. Here, not
        # by a decorator, because importing this module does without PyTorch.
        if not hasattr(Installed._exact_decode, "_torchdynamo_orig_callable"):
            Installed._exact_decode = torch.compiler.disable(Installed._exact_decode)  # type: ignore[method-assign, no-untyped-call]
        self._decode = self._exact_decode
        vae._decode = self._decode

    def remove(self) -> None:
        """Undo `install`; a second call does nothing.

        Raises:
            InvalidOptionError: something else replaced ``vae._decode`` since; undo that first.
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
        """In place of ``AutoencoderKL._decode``, below ``decode``'s own hooks, slicing and return types."""
        import torch
        from diffusers.models.autoencoders.vae import DecoderOutput

        from fluxvae.latent_values import plain

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
        # A model fresh from from_pretrained has requires_grad everywhere; only training mode means it.
        return list(self.vae.decoder.parameters()) if self.vae.training else []


def install(
    vae: AutoencoderKL,
    *,
    memory_limit: int | str | None = None,
    spill_dir: str | Path | None = None,
    kernels: str = "auto",
) -> Installed:
    """Make ``vae.decode`` exact and bounded in memory, in place, for whatever pipeline holds it.

    Only ``vae._decode`` is replaced: offload hooks on ``decode`` run as before, ``return_dict`` and slicing work as
    before (slicing saves nothing here: images are decoded one by one anyway), ``vae.encode`` is not touched.

    Args:
        vae: ``pipe.vae``.
        memory_limit: bytes a decode may add above the loaded weights, or ``"4GiB"``; None: what is free.
        spill_dir: where feature maps go that memory has no room for.
        kernels: as for `fluxvae.Decoder`.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        InvalidOptionError: an option that is unknown, a VAE this engine cannot read, one with tiling switched on (also
            when it is switched on later, at the next decode), or one that has been installed into already.
    """
    from fluxvae.engine.exact import ExactEngine
    from fluxvae.engine.module_state import unwrapped

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
