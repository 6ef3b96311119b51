"""A VAE for ComfyUI that is on a fluxvae server: latents and pictures are sent there, and exact ones come back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import comfy.sd
import torch

from fluxvae.errors import FluxVAEError, InvalidLatentsError, InvalidOptionError

from .calls import cropped, interruptible, one_frame, progress_bar, refuse_options, refuse_video
from .gateway import Answer, Server, split_address

__all__ = ["KINDS", "RemoteVAE", "read_server"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """The LATENTs and IMAGEs of one kind of VAE, as ComfyUI has them, and what a server calls that VAE."""

    words: str
    vae_class: str
    """The class of the server's VAE in its ``/info``."""
    models: str
    """What follows ``vae_decoder`` and ``vae_encoder`` in the names of its models."""
    channels: int
    """The channels of a LATENT. ComfyUI has FLUX.2's in 2x2 patches."""
    scale: int
    """How many pixels there are for each value of a LATENT, each way."""
    time: bool = False
    """Whether LATENTs have an axis of time, (B, C, 1, lh, lw)."""
    pictures: int = 3
    """The channels of an IMAGE."""
    normalised: bool = False
    """Whether ComfyUI's LATENTs are scaled as the model's transformer takes them; all others are raw."""


KINDS = {
    "FLUX.1, SD3": Kind("those of 16 channels", "AutoencoderKL", "", 16, 8),
    "FLUX.2": Kind("those of FLUX.2", "AutoencoderKLFlux2", "_flux2", 128, 16, normalised=True),
    "Qwen-Image, Wan 2.1": Kind("those of Qwen-Image", "AutoencoderKLQwenImage", "_qwen_image", 16, 8, time=True),
    "Qwen-Image-Layered": Kind(
        "those of Qwen-Image-Layered", "AutoencoderKLQwenImage", "_qwen_image", 16, 8, time=True, pictures=4
    ),
}
"""What the node may be set to."""


@dataclass(frozen=True)
class Served:
    """A server, and the paths of its models for one kind of latents."""

    server: Server
    kind: Kind
    decode: str | None
    encode: str | None


def read_server(address: str, token: str, timeout_s: float, *, kind: Kind, token_variable: str) -> Served:
    """Ask a server which models it has.

    Args:
        address: of its gateway.
        token: what it asks for, or an empty text.
        timeout_s: the seconds that one picture may take.
        kind: whose latents they are that models are wanted for.
        token_variable: where the token was read from, for messages.

    Raises:
        InvalidOptionError: the address is none, or the server has no model for these latents.
        FluxVAEError: it does not answer, or refuses.
    """
    split_address(address)
    server = Server(address.strip().rstrip("/"), token, token_variable, timeout_s)
    answer = server.ask("GET", "/info", cancel=management.processing_interrupted)
    try:
        models = [dict(model) for model in json.loads(answer.body)["models"].values()]
        fitting = [model for model in models if model["vae_class"] == kind.vae_class and not model["approximate"]]
        paths = {bool(model["encodes"]): str(model["path"]) for model in reversed(fitting)}
        names = ", ".join(str(model["model"]) for model in models)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FluxVAEError(
            f"server: {address} does not say what it serves; expected fluxvae's gateway, as `fluxvae serve` starts it"
        ) from error
    if not paths:
        raise InvalidOptionError(
            f"latents: got {kind.words}, but {address} serves {names}; choose another kind, or serve --model "
            f"vae_decoder{kind.models}=CHECKPOINT"
        )
    return Served(server, kind, paths.get(False), paths.get(True))


class RemoteVAE(comfy.sd.VAE):
    """A VAE that decodes and encodes on a server. It has no weights here.

    Args:
        served: the server and its models.
    """

    def __init__(self, served: Served) -> None:
        # Not super().__init__, which makes a network. These attributes are those that nodes read of a VAE.
        self.fluxvae_served = served
        self.first_stage_model = self.patcher = None
        self.device = torch.device("cpu")
        self.output_device = management.intermediate_device()
        self.vae_dtype = torch.float32
        self.working_dtypes = [torch.float32]
        self.downscale_ratio = self.upscale_ratio = served.kind.scale
        self.latent_channels, self.output_channels = served.kind.channels, served.kind.pictures
        self.latent_dim = 3 if served.kind.time else 2
        self.downscale_index_formula = self.upscale_index_formula = self.extra_1d_channel = None
        self.disable_offload = self.not_video = self.handles_tiling = False
        self.crop_input, self.size = True, 0
        self.process_input: Callable[[torch.Tensor], torch.Tensor] = lambda image: image * 2.0 - 1.0
        self.process_output: Callable[[torch.Tensor], torch.Tensor] = lambda image: torch.clamp(
            (image + 1.0) / 2.0, min=0.0, max=1.0
        )
        self.memory_used_decode = self.memory_used_encode = lambda shape, dtype: 1  # nothing is computed here

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """Decode a LATENT's samples on the server, one picture after another. As `ExactVAE.decode`.

        Raises:
            FluxVAEError: the server refused a request or failed, or does not answer.
        """
        refuse_options(vae_options)
        samples = one_frame(samples_in)
        channels = self.fluxvae_served.kind.channels
        if samples.shape[1] != channels:
            raise InvalidLatentsError(
                f"samples: got {samples.shape[1]} channels, but the node is set to latents of {channels}; set its "
                "latents to what the model makes"
            )
        pixels = self._each(samples, self.fluxvae_served.decode, "decode", output_type="pt")
        if pixels.shape[1] != self.output_channels:
            raise InvalidOptionError(
                f"latents: the server's pictures have {pixels.shape[1]} channels, but the node is set to latents of "
                f"pictures of {self.output_channels}; set its latents to what the server's checkpoint is of"
            )
        images = self.process_output(pixels).to(self.output_device).movedim(1, -1)
        return images[:, None] if self.latent_dim == 3 and samples_in.ndim == 5 else images

    def encode(self, pixel_samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Encode an IMAGE on the server, one picture after another. As `ExactVAE.encode`.

        Raises:
            FluxVAEError: as for `decode`; the server takes values in [0, 1] only.
        """
        if self.latent_dim == 3:
            refuse_video(pixel_samples)
        pixels = cropped(pixel_samples, self.spacial_compression_encode(), self.output_channels).movedim(-1, 1)
        pixels = self.process_input(pixels.float())
        latents = self._each(pixels, self.fluxvae_served.encode, "encode", do_normalize="False").to(self.output_device)
        return latents[:, :, None] if self.latent_dim == 3 else latents

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Decode on the server too, which keeps to its own memory limit."""
        return self.decode(samples)

    def encode_tiled(self, pixel_samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Encode on the server too, which keeps to its own memory limit."""
        return self.encode(pixel_samples)

    def get_sd(self) -> dict[str, torch.Tensor]:
        """Refuse to give weights, which are on the server."""
        raise FluxVAEError("vae: a remote VAE has no weights here; connect the VAE of a loader to save one")

    def spacial_compression_decode(self) -> int:
        """Return the pixels for each latent, each way."""
        return self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        """Return the same."""
        return self.downscale_ratio

    def temporal_compression_decode(self) -> None:
        """Return None: it decodes no videos."""

    def is_dynamic(self) -> bool:
        """Return whether weights are loaded as they are used."""
        return False

    def _each(self, given: torch.Tensor, path: str | None, way: str, **query: str) -> torch.Tensor:
        """Send tensors (B, ...) one by one, and return what comes back, in float32 on the CPU."""
        served = self.fluxvae_served
        if path is None:
            model = {"decode": "vae_decoder", "encode": "vae_encoder"}[way] + served.kind.models
            raise InvalidOptionError(
                f"server: {served.server.address} does not {way} such latents; serve --model {model}=CHECKPOINT there"
            )
        if served.kind.normalised:
            query["do_scaling"] = "True"
        move, made = progress_bar(), []
        with interruptible() as cancel:
            move(0, 0, len(given))
            for index, one in enumerate(given):
                sent = one[None].to("cpu", torch.float32).contiguous()
                asked = {"shape": list(sent.shape), "dtype": "float32", **query}
                answer = served.server.ask("POST", path, asked, memoryview(sent.numpy()).cast("B"), cancel)
                if "x-fluxvae-warning" in answer.headers:
                    log.warning("fluxvae: the server says: %s", answer.headers["x-fluxvae-warning"])
                made.append(_tensor(answer))
                move(0, index + 1, len(given))
        return torch.cat(made)


def _tensor(answer: Answer) -> torch.Tensor:
    """Return the tensor of an answer, whose headers say its shape and dtype."""
    try:
        shape = [int(length) for length in json.loads(answer.headers["shape"])]
        if answer.headers["dtype"] != "float32":
            raise ValueError
        return torch.frombuffer(bytearray(answer.body), dtype=torch.float32).reshape(shape)
    except (KeyError, ValueError, RuntimeError) as error:
        raise FluxVAEError("server: its answer is no float32 tensor; expected fluxvae's gateway") from error
