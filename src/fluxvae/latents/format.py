"""Latents to raw latents and back: what the pipelines do between the transformer and the VAE, as a checkpoint says.

`LatentFormat` is the one object that knows the differences between models, and nothing behind it does.

The arithmetic is that of the pipelines of diffusers 0.42.1, which docs/models.md lists: of the last lines of
``__call__``, and on the way back of ``_encode_vae_image`` or, for SD's families, ``prepare_latents`` of img2img.

`LatentFormat.from_vae` and `from_config` are where a class of VAE becomes a format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxvae.errors import CheckpointError
from fluxvae.latents.packing import patchify, unpatchify
from fluxvae.latents.reading import UNSAID, Reading

if TYPE_CHECKING:
    import torch

__all__ = ["PREVIEW_LATENTS_NOTE", "PREVIEW_NOTE", "BatchNorm", "LatentFormat"]

_WITH_FRAMES = ("AutoencoderKLQwenImage", "AutoencoderKLWan")
"""The classes whose tensors have an axis of time, and whose latents have a mean and a deviation for each channel."""
_CLASSES = ("AutoencoderKLFlux2", "AutoencoderTiny", *_WITH_FRAMES)
"""All but ``AutoencoderKL``, which every other class is read as."""

PREVIEW_NOTE = "approximate preview by AutoencoderTiny, not the image the full VAE decodes"
"""The words that go with every image that is such a preview, wherever it goes."""
PREVIEW_LATENTS_NOTE = "approximate latents by AutoencoderTiny, not those the full VAE encodes"
"""The same for latents."""


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """FLUX.2's statistics of its latents: one mean and one variance for each of the 128 channels of a 2x2 patch."""

    module: torch.nn.BatchNorm2d | None
    """``vae.bn``. It is read when it is used, so that it may move with its model. None: only the formula is known."""
    eps: float
    """The ``batch_norm_eps`` of the checkpoint's config."""

    def undo(self, patches: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        """Return ``patches * sqrt(running_var + eps) + running_mean``, rounded where `Flux2Pipeline` rounds.

        Args:
            patches: (B, 128, gh, gw), normalised.
            eps: is used instead of the checkpoint's own.
        """
        mean, std = self._statistics(patches, eps)
        return patches * std + mean

    def apply(self, patches: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        """Return ``(patches - running_mean) / sqrt(running_var + eps)``, the way back of `undo`."""
        mean, std = self._statistics(patches, eps)
        return (patches - mean) / std

    def _statistics(self, patches: torch.Tensor, eps: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.module is not None, "a format that was read from a config computes nothing"
        mean, var = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert var is not None
        std = (var.view(1, -1, 1, 1) + (self.eps if eps is None else eps)).sqrt()
        mean = mean.view(1, -1, 1, 1)
        return mean.to(patches.device, patches.dtype), std.to(patches.device, patches.dtype)


@dataclass(frozen=True)
class LatentFormat:
    """How the latents of one checkpoint become raw latents: read from it, and the same for every decode.

    ``raw = latents / scaling_factor + shift_factor`` (no addition where the checkpoint has no shift), or by statistics
    of the checkpoint: FLUX.2's `BatchNorm`, or ``latents_mean`` and ``latents_std``. The defaults are FLUX.1's.
    """

    channels: int = 16
    vae_scale_factor: int = 8
    """How many pixels there are for each latent, in each direction."""
    scaling_factor: float = 0.3611
    """It is 1 where there are `statistics` instead."""
    shift_factor: float | None = 0.1159
    latents_mean: tuple[float, ...] | None = None
    """Some SDXL checkpoints have these two, by channel: ``raw = latents * latents_std / scaling_factor +
    latents_mean``. VAEs with `frames` have them always, and no factor: ``raw = latents / (1 / latents_std) +
    latents_mean``."""
    latents_std: tuple[float, ...] | None = None
    batch_norm: BatchNorm | None = None
    flux2: bool = False
    """Whether tokens may come with position ids, and unpacked latents in 2x2 patches, as in FLUX.2's pipelines."""
    preview: bool = False
    """Whether it is an ``AutoencoderTiny``, which takes latents as the transformer leaves them and whose image is
    approximate."""
    frames: bool = False
    """Whether the VAE's own tensors have an axis of time, (B, C, F, lh, lw). A picture is one frame, F = 1."""
    layers: bool = False
    """Whether frames may be the layers of one picture, each of which is a picture by itself. Such are
    QwenImageLayeredPipeline's, whose pictures have alpha. Frames of other VAEs are a video's."""

    @classmethod
    def from_vae(cls, vae: Any) -> LatentFormat:
        """Read the format of a VAE of one of the classes in `fluxvae.options.CLASSES`."""
        kinds = {kind.__name__ for kind in type(vae).__mro__}
        known = next((name for name in _CLASSES if name in kinds), "AutoencoderKL")
        return cls.from_config(vae.config, known, getattr(vae, "bn", None))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], model: str = "AutoencoderKL", bn: torch.nn.BatchNorm2d | None = None
    ) -> LatentFormat:
        """Read the format from a config that leaves nothing out.

        Args:
            model: the name of the VAE's class, one of `fluxvae.options.CLASSES`.
            bn: the statistics of an ``AutoencoderKLFlux2``. Without them the format only describes itself.

        Raises:
            CheckpointError: the config has a mean and a deviation that are not one number for each channel, or that
                come with a shift, or it lacks them where the class has nothing else.
        """
        if model in _WITH_FRAMES:
            return cls._with_frames(config)
        if model == "AutoencoderKLFlux2":
            return cls(
                channels=config["latent_channels"],
                vae_scale_factor=2 ** (len(config["block_out_channels"]) - 1),
                scaling_factor=1.0,
                shift_factor=None,
                batch_norm=BatchNorm(bn, config["batch_norm_eps"]),
                flux2=True,
            )
        if model == "AutoencoderTiny":
            return cls(
                channels=config["latent_channels"],
                vae_scale_factor=config["upsampling_scaling_factor"] ** (len(config["num_decoder_blocks"]) - 1),
                scaling_factor=config["scaling_factor"],
                shift_factor=config["shift_factor"],
                flux2=config["latent_channels"] == 32,
                preview=True,
            )
        channels, shift = config["latent_channels"], config.get("shift_factor")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:  # StableDiffusionXLPipeline asks for both
            mean = std = None
        elif shift is not None or len(mean) != channels or len(std) != channels:
            raise CheckpointError(
                f"checkpoint: config.json has latents_mean of {len(mean)} and latents_std of {len(std)} values, and "
                f"shift_factor {shift}; expected {channels} values each, and no shift_factor: no pipeline reads others"
            )
        return cls(
            channels=channels,
            vae_scale_factor=2 ** (len(config["block_out_channels"]) - 1),
            scaling_factor=config["scaling_factor"],
            shift_factor=shift,
            latents_mean=None if mean is None else tuple(mean),
            latents_std=None if std is None else tuple(std),
        )

    @classmethod
    def _with_frames(cls, config: Mapping[str, Any]) -> LatentFormat:
        channels, mean, std = config["z_dim"], config["latents_mean"], config["latents_std"]
        lengths = [None if values is None else len(values) for values in (mean, std)]
        if lengths != [channels, channels]:
            raise CheckpointError(
                f"checkpoint: config.json has latents_mean of {lengths[0]} and latents_std of {lengths[1]} values; "
                f"expected {channels} values each, one for each channel of z_dim"
            )
        # AutoencoderKLQwenImage has one name for the channels of its pictures, AutoencoderKLWan one for each way.
        pictures = config["input_channels"] if "input_channels" in config else config["out_channels"]
        return cls(
            channels=channels,
            vae_scale_factor=2 ** len(config["temperal_downsample"]),
            scaling_factor=1.0,
            shift_factor=None,
            latents_mean=tuple(mean),
            latents_std=tuple(std),
            frames=True,
            layers=pictures == 4,
        )

    @property
    def statistics(self) -> bool:
        """Whether latents are rescaled by the checkpoint's statistics alone, and there is no ``scaling_factor``."""
        return self.batch_norm is not None or self.frames

    @property
    def packed_features(self) -> int:
        """The number of features of one packed token, which is a 2x2 patch of every channel."""
        return 4 * self.channels

    @property
    def packed_multiple(self) -> int:
        """How many pixels there are for each packed token, in each direction: 16 for FLUX."""
        return 2 * self.vae_scale_factor

    def multiple(self, *, packed: bool, raw: bool = False) -> int:
        """Return of how many pixels the sides of a picture must be multiples that is encoded to such latents.

        Packed latents come in patches of 2x2 always, and FLUX.2's unless they are raw.
        """
        return self.packed_multiple if packed or (self.flux2 and not raw) else self.vae_scale_factor

    def __str__(self) -> str:
        if self.batch_norm is not None:
            return f"latents * sqrt(running_var + {self.batch_norm.eps:g}) + running_mean"
        if self.frames:
            return "latents / (1 / latents_std) + latents_mean"
        std = "" if self.latents_std is None else " * latents_std"
        shift = " + latents_mean" if self.latents_mean is not None else ""
        return f"latents{std} / {self.scaling_factor}{shift}" + (f" + {self.shift_factor}" if self.shift_factor else "")

    def to_raw(self, latents: torch.Tensor, reading: Reading = UNSAID) -> torch.Tensor:
        """Undo the model's scaling, in the dtype of ``latents``, as its pipeline computes it.

        Args:
            latents: (B, C, lh, lw), or (B, 4*C, gh, gw) in FLUX.2's patches, as the transformer leaves them.
            reading: what it says about rescaling is used instead of the checkpoint's own. It has passed
                `checks.check_options`.

        Returns:
            Raw latents (B, C, lh, lw), in the same dtype.
        """
        in_patches, order = latents.shape[1] == 4 * self.channels, reading.feature_order
        if self.batch_norm is not None and not reading.raw:
            # The statistics are in the order of the features, so latents that are no patches are put into it too.
            patches = latents if in_patches else patchify(latents, feature_order=order)
            return unpatchify(self.batch_norm.undo(patches, reading.batch_norm_eps), feature_order=order)
        if in_patches:
            latents = unpatchify(latents, feature_order=order)
        if reading.raw:
            return latents
        if self.frames:
            mean, std = self._mean_and_deviation(latents)
            # The pipelines cast the deviation first, and divide by its reciprocal in that dtype.
            return latents / (1.0 / std) + mean
        if self.latents_std is not None:
            latents = latents * _by_channel(self.latents_std, latents)
        latents = latents / (self.scaling_factor if reading.scaling_factor is None else reading.scaling_factor)
        if self.latents_mean is not None:
            return latents + _by_channel(self.latents_mean, latents)
        shift = self.shift_factor if reading.shift_factor is None else reading.shift_factor
        return latents if shift is None else latents + shift

    def from_raw(self, raw: torch.Tensor, reading: Reading = UNSAID, *, drawn: bool = False) -> torch.Tensor:
        """Apply the model's scaling, in the dtype of ``raw``, as its pipeline computes it: the way back of `to_raw`.

        Args:
            raw: raw latents (B, C, lh, lw), which the VAE gave.
            reading: as for `to_raw`.
            drawn: whether the latents were drawn from the VAE's distribution rather than its mode. Where there are
                `frames`, diffusers' pipelines have two formulas whose last bits differ: those that take the mode
                (QwenImageEditPlusPipeline) divide by the deviation, and those that draw (QwenImageImg2ImgPipeline)
                multiply by its reciprocal.

        Returns:
            What the transformer is given: (B, C, lh, lw), or for FLUX.2 patches (B, 4*C, gh, gw), in the same dtype.
            Where the reading says raw, ``raw`` itself.
        """
        if reading.raw:
            return raw
        if self.batch_norm is not None:
            return self.batch_norm.apply(patchify(raw), reading.batch_norm_eps)
        if self.frames:
            mean, std = self._mean_and_deviation(raw)
            return (raw - mean) * (1.0 / std) if drawn else (raw - mean) / std
        scale = self.scaling_factor if reading.scaling_factor is None else reading.scaling_factor
        if self.latents_mean is not None:
            raw = raw - _by_channel(self.latents_mean, raw)
        else:
            shift = self.shift_factor if reading.shift_factor is None else reading.shift_factor
            raw = raw if shift is None else raw - shift
        latents = raw * scale
        if self.latents_std is not None:
            latents = latents / _by_channel(self.latents_std, latents)
        return patchify(latents) if self.flux2 else latents

    def _mean_and_deviation(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.latents_mean is not None
        assert self.latents_std is not None
        return _by_channel(self.latents_mean, like), _by_channel(self.latents_std, like)


def _by_channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    import torch

    # Rounded from float32, as the pipelines' own torch.tensor(...) is, whatever the process's default dtype.
    factors = torch.tensor(values, dtype=torch.float32, device="cpu")
    return factors.view(1, -1, 1, 1).to(like.device, like.dtype)
