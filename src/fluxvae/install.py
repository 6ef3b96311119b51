"""`install` makes any diffusers pipeline with one of the full VAEs decode and encode exactly, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvae.engine.plan import parse_memory_limit
from fluxvae.engine.way import DECODE, ENCODE
from fluxvae.errors import InvalidOptionError

if TYPE_CHECKING:  # elsewhere they are imported inside the functions, so that `import fluxvae` does not import them
    import torch
    from diffusers import AutoencoderKL

    from fluxvae.engine.bounded import ExactEngine
    from fluxvae.engine.exact import ExactDecoder, ExactEncoder
    from fluxvae.engine.reference import ReferenceDecoder, ReferenceEncoder, ReferenceEngine

__all__ = ["Installed", "install"]


class Installed:
    """The handle of an `install`: `remove` undoes it, and so does leaving a ``with`` block of the handle."""

    def __init__(
        self,
        vae: AutoencoderKL,
        decoder: ExactDecoder | ReferenceDecoder | None,
        encoder: ExactEncoder | ReferenceEncoder | None,
    ) -> None:
        from fluxvae.engine.frames import has_frames

        self.vae = vae
        self.decoder = decoder
        """The engine that decodes; None where the VAE has no decoder."""
        self.encoder = encoder
        """The engine that encodes; None where the VAE has no encoder."""
        self.progress: Callable[[int, int], None] | None = None
        """May be set: it is called with the steps of a call that are done and those that there are."""
        self.cancel: Callable[[], bool] | None = None
        """May be set: it is asked again and again, and a call ends with `DecodeCancelled` when it returns true."""
        self._frames = has_frames(vae)
        self._put: dict[str, Callable[..., Any]] = {}
        _keep_from_tracing()
        if decoder is not None:
            self._put["_decode"] = self._exact_decode
        if encoder is not None:
            self._put["_encode"] = self._exact_encode
        for name, method in self._put.items():
            setattr(vae, name, method)

    def remove(self) -> None:
        """Undo `install`. A second call does nothing.

        Raises:
            InvalidOptionError: something else has replaced ``vae._decode`` or ``vae._encode`` since; that must be
                undone first.
        """
        for name, method in self._put.items():
            there = self.vae.__dict__.get(name)
            if there is not None and there is not method:
                raise InvalidOptionError(
                    f"vae: got a {name} that fluxvae.install did not put there ({there!r}); undo that replacement first"
                )
        for name in self._put:
            if name in self.vae.__dict__:
                delattr(self.vae, name)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _exact_decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """Replace ``AutoencoderKL._decode``: decode raw latents (B, C, lh, lw) to (B, 3, H, W) with the exact engine.

        ``vae.decode`` calls this method, and its own hooks, slicing and return types stay as they are. A VAE with an
        axis of time takes (B, C, 1, lh, lw) and gives (B, 3 or 4, 1, H, W). Where its own ``_decode`` clamps pixels to
        [-1, 1], so does the engine.
        """
        from diffusers.models.autoencoders.vae import DecoderOutput

        from fluxvae.engine.frames import without_frame
        from fluxvae.latents.values import plain

        assert self.decoder is not None
        self._check(self.decoder, z)
        z = plain(z)
        raw = without_frame(z, DECODE) if self._frames else z
        sample = self.decoder.decode(raw, progress=self.progress, cancel=self.cancel)
        if self._frames:
            sample = sample.unsqueeze(2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _exact_encode(self, x: torch.Tensor) -> torch.Tensor:
        """Replace ``AutoencoderKL._encode``: encode pixels (B, 3, H, W) to moments (B, 2*C, lh, lw), exactly.

        ``vae.encode`` calls this method and makes its distribution of the result; its own hooks, slicing and return
        types stay as they are. Where there is an axis of time, both have it, with one frame.
        """
        from fluxvae.engine.frames import without_frame
        from fluxvae.latents.values import plain

        assert self.encoder is not None
        self._check(self.encoder, x)
        x = plain(x)
        pixels = without_frame(x, ENCODE) if self._frames else x
        moments = self.encoder.encode(pixels, progress=self.progress, cancel=self.cancel)
        return moments.unsqueeze(2) if self._frames else moments

    def _check(self, engine: ExactEngine | ReferenceEngine, given: torch.Tensor) -> None:
        """Refuse what the engine does not do: tiles, and gradients."""
        import torch

        way = engine.way
        if self.vae.use_tiling:
            raise InvalidOptionError(
                "use_tiling: got True; tiles are blended, not exact, and fluxvae.install bounds memory without them; "
                "call pipe.vae.disable_tiling(), or handle.remove() to tile"
            )
        # Every parameter of a model fresh from from_pretrained has requires_grad, so only the training mode shows that
        # gradients are really wanted.
        trained = list(getattr(self.vae, way.network).parameters()) if self.vae.training else []
        if torch.is_grad_enabled() and (given.requires_grad or any(one.requires_grad for one in trained)):
            raise InvalidOptionError(
                f"vae: got {way.given} to {way.name} while gradients are recorded, which the exact engine does not do; "
                f"{way.name} under torch.no_grad(), or call handle.remove() to train"
            )


def _keep_from_tracing() -> None:
    """Keep torch.compile from tracing our methods when code around them is compiled: it would take minutes or fail.

    They are the methods of the class, whose bound ones a copy of the VAE takes along. No decorator does this, because
    that would import PyTorch together with this module.
    """
    import torch

    for name in ("_exact_decode", "_exact_encode"):
        method = getattr(Installed, name)
        if not hasattr(method, "_torchdynamo_orig_callable"):
            setattr(Installed, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]


def install(
    vae: AutoencoderKL,
    *,
    memory_limit: int | str | None = None,
    spill_dir: str | Path | None = None,
    kernels: str = "auto",
    cuda_graphs: bool = False,
    keep_memory: bool = False,
) -> Installed:
    """Make ``vae.decode`` and ``vae.encode`` exact and bounded in memory, in place, whatever pipeline holds the VAE.

    Only ``vae._decode`` and ``vae._encode`` are replaced. Offload hooks run as before, and ``return_dict``, slicing and
    the distribution that ``encode`` returns are diffusers' own. (Slicing saves nothing, because images are computed one
    by one anyway.) Of a VAE that has one half alone, that half is replaced.

    Args:
        vae: the pipeline's VAE, ``pipe.vae``.
        memory_limit: the bytes that a call may add above the loaded weights, as a number or as a text such as
            ``"4GiB"``. None allows what is free.
        spill_dir: the folder for feature maps that memory has no room for.
        kernels, cuda_graphs: as for `fluxvae.Decoder`. Graphs are of no use to a pipeline that moves its VAE between
            images, as those with offloading do: a moved model is recorded anew.
        keep_memory: as for `fluxvae.Decoder`, for each half of the VAE.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        InvalidOptionError: an option is unknown, the engine cannot read this VAE, tiling is switched on, or this VAE
            has been installed into already. If tiling is switched on later, the next call raises this error.
    """
    from fluxvae.engine.exact import ExactDecoder, ExactEncoder
    from fluxvae.engine.layers.reading import unwrapped
    from fluxvae.options import FULL_CLASSES, check_vae

    vae = unwrapped(vae)
    check_vae(vae, "give it the pipeline's own, pipe.vae", classes=FULL_CLASSES)
    for name in ("_decode", "_encode"):
        if name in vae.__dict__:
            raise InvalidOptionError(
                f"vae: its {name} has been replaced already; call remove() on the handle of the first install"
            )
    if getattr(vae, "use_tiling", False):
        raise InvalidOptionError(
            "use_tiling: got True; tiles are blended, not exact; call vae.disable_tiling() before fluxvae.install"
        )
    limit = None if memory_limit is None else parse_memory_limit(memory_limit)
    halves = [way for way in (DECODE, ENCODE) if getattr(vae, way.network, None) is not None]
    options: dict[str, Any] = {
        "kernels": kernels, "memory_limit": limit, "spill_dir": spill_dir, "cuda_graphs": cuda_graphs,
        "keep_memory": keep_memory,
    }  # fmt: skip
    decoder = ExactDecoder(vae, **options) if halves != [ENCODE] else None  # which refuses what has neither half
    encoder = ExactEncoder(vae, **options) if ENCODE in halves else None
    return Installed(vae, decoder, encoder)
