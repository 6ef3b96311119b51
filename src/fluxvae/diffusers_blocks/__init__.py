"""Steps for diffusers' modular pipelines that decode and encode with fluxvae, in this process or on a server.

    blocks = LocalVaeStep.replace_all(Flux2AutoBlocks(), memory_limit="4GiB")     # or
    blocks = RemoteVaeStep.replace_all(Flux2AutoBlocks(), "gpu-box:8001")
    pipe = blocks.init_pipeline("black-forest-labs/FLUX.2-dev")

A step here holds one of diffusers' own steps and runs it. All that the pipeline sees is that step's: inputs, outputs,
defaults, what is computed before and after the VAE, and so what the next version of diffusers changes there. Only the
``vae`` that the step sees is another: a shallow copy of the pipeline's, into which `fluxvae.install` put an engine, or
a `fluxvae.client.RemoteVAE`. The alternative was steps of our own for each family. They would have repeated diffusers'
unpacking, rescaling and cropping, and a difference in any of it would be another image without an error.

The pipeline's own ``vae`` is not changed, so pipelines that share one, also in threads, do not notice each other.

`RemoteVaeStep` needs the extra: ``pip install 'fluxvae[client]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fluxvae.diffusers_blocks.local import LocalVaeStep
from fluxvae.diffusers_blocks.step import VaeStep

if TYPE_CHECKING:
    from fluxvae.diffusers_blocks.remote import RemoteVaeStep

__all__ = ["LocalVaeStep", "RemoteVaeStep", "VaeStep"]


def __getattr__(name: str) -> Any:
    """Import what needs the client only when it is first used."""
    if name != "RemoteVaeStep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = importlib.import_module("fluxvae.diffusers_blocks.remote").RemoteVaeStep
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
