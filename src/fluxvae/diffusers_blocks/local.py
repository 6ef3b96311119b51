"""`LocalVaeStep`: the pipeline's own VAE, computed by an engine of fluxvae."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fluxvae.diffusers_blocks.step import VaeStep
from fluxvae.engine.kernels.choose import check_kernels
from fluxvae.engine.layers.reading import unwrapped
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.plan import parse_memory_limit
from fluxvae.engine.reference import ReferenceDecoder, ReferenceEncoder
from fluxvae.engine.way import DECODE, ENCODE
from fluxvae.errors import InvalidOptionError
from fluxvae.install import Installed, install
from fluxvae.options import FULL_CLASSES, check_engine_options, check_vae

if TYPE_CHECKING:
    from diffusers.modular_pipelines import ModularPipelineBlocks
    from typing_extensions import Self

__all__ = ["LocalVaeStep"]


class LocalVaeStep(VaeStep):
    """A step that decodes or encodes with the pipeline's own ``vae``, by an engine of fluxvae.

    Args:
        step: diffusers' step, such as ``Flux2DecodeStep()``.
        engine: ``"exact"`` computes what diffusers computes without tiles, in bounded memory. ``"diffusers"`` has the
            bits of diffusers' own step, with PyTorch's default settings, and NaN or Inf is an error.
        memory_limit: how many bytes one call of the VAE may add above the loaded weights, also as a text such as
            ``"4GiB"``. None: what is free.
        spill_dir: a folder on a disk, for what the limit leaves no room for.
        kernels: as for `fluxvae.Decoder`.
        progress: is called with the steps that are done and those that there are, in each call of the VAE: a step that
            encodes several references calls it once for each of them.
        cancel: is asked again and again meanwhile, and ends the pipeline with a `DecodeCancelled` when it returns true.

    Raises:
        InvalidOptionError: the step has no VAE that fluxvae knows, or an option is unknown or is another engine's.
            What depends on the VAE itself is raised when the step runs: for tiling, or a size that needs more memory.
    """

    def __init__(
        self,
        step: ModularPipelineBlocks,
        *,
        engine: str = "exact",
        memory_limit: int | str | None = None,
        spill_dir: str | Path | None = None,
        kernels: str = "auto",
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(step)
        if engine not in ("exact", "diffusers"):
            raise InvalidOptionError(f"engine: got {engine!r}, expected 'exact' or 'diffusers'")
        limit = None if memory_limit is None else parse_memory_limit(memory_limit)
        self._options = {"kernels": kernels, "memory_limit": limit, "spill_dir": spill_dir}
        check_engine_options(engine, self._options)
        check_kernels(kernels)
        if spill_dir is not None:
            Spill(torch.device("cpu"), spill_dir)
        for name, called in (("progress", progress), ("cancel", cancel)):
            if called is not None and not callable(called):
                raise InvalidOptionError(f"{name}: got {type(called).__name__}, expected a function")
        self.engine = engine
        self._progress, self._cancel = progress, cancel

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the step, but not what is called meanwhile: ``cancel`` may be the method of an object with a lock."""
        made = copy.copy(self)
        memo[id(self)] = made
        made.step, made.sub_blocks = copy.deepcopy(self.step, memo), copy.deepcopy(self.sub_blocks, memo)
        return made

    def vae_for(self, components: Any) -> Any:
        vae = unwrapped(components.vae)
        check_vae(vae, "pipe.load_components(names='vae') loads the pipeline's", classes=FULL_CLASSES)
        seen = copy.copy(vae)  # with the modules of the pipeline's own, and with methods of its own
        if self.engine == "exact":
            handle = install(seen, **self._options)  # type: ignore[arg-type]
        else:
            handle = Installed(
                seen,
                ReferenceDecoder(vae) if getattr(vae, DECODE.network, None) is not None else None,
                ReferenceEncoder(vae) if getattr(vae, ENCODE.network, None) is not None else None,
            )
        handle.progress, handle.cancel = self._progress, self._cancel
        return seen
