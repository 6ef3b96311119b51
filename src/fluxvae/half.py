"""What `Decoder` and `Encoder` have in common: each is one half of a VAE on one device, with an engine of its own."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from fluxvae.checkpoints import open_checkpoint
from fluxvae.engine.layers.reading import unwrapped
from fluxvae.engine.module_state import check_loaded
from fluxvae.engine.plan import Plan, check_size, parse_memory_limit
from fluxvae.engine.preview import ApproximateWarning
from fluxvae.engine.settings import set_aside
from fluxvae.engine.way import DECODE, Way
from fluxvae.errors import InvalidOptionError
from fluxvae.forked import refuse_to_hang
from fluxvae.latents.format import LatentFormat
from fluxvae.options import VAE, check_engine_options, check_vae, resolve_device, resolve_dtype, resolve_engine

if TYPE_CHECKING:
    from typing_extensions import Self

    from fluxvae.engine.bounded import ExactEngine
    from fluxvae.engine.preview import PreviewEngine
    from fluxvae.engine.reference import ReferenceEngine

__all__ = ["Half"]

Exact = TypeVar("Exact", bound="ExactEngine")
Reference = TypeVar("Reference", bound="ReferenceEngine")
Preview = TypeVar("Preview", bound="PreviewEngine")


class Half(Generic[Exact, Reference, Preview]):
    """One half of a VAE, which is used as it is. Arguments as for `fluxvae.Decoder`."""

    way: ClassVar[Way]
    engines: ClassVar[tuple[type[Any], type[Any], type[Any]]]
    """The exact engine, the reference engine and the preview engine of this half."""

    def __init__(
        self,
        vae: VAE,
        *,
        device: str | torch.device,
        dtype: str | torch.dtype,
        engine: str,
        kernels: str,
        memory_limit: int | str | None,
        spill_dir: str | Path | None,
        cuda_graphs: bool,
        keep_memory: bool,
        tiling: bool,
        slicing: bool,
    ) -> None:
        vae = unwrapped(vae)
        check_vae(vae, f"{type(self).__name__}.from_pretrained loads one")
        refuse_to_hang()
        if getattr(vae, self.way.network) is None:
            other = "fluxvae.Decoder" if self.way != DECODE else "fluxvae.Encoder"
            raise InvalidOptionError(
                f"vae: got a {type(vae).__name__} without its {self.way.network}, as {other}.from_pretrained loads it; "
                f"{type(self).__name__}.from_pretrained loads the half that is needed here"
            )
        check_loaded(vae, self.way)
        engine = resolve_engine(engine, vae)
        given = {
            "kernels": kernels,
            "memory_limit": memory_limit,
            "spill_dir": spill_dir,
            "cuda_graphs": cuda_graphs,
            "keep_memory": keep_memory,
            "tiling": tiling,
            "slicing": slicing,
        }
        check_engine_options(engine, given)
        where = vae.device if device == "auto" else resolve_device(device)
        precision = vae.dtype if dtype == "auto" else resolve_dtype(dtype, where)
        if (device, dtype) != ("auto", "auto"):
            torch.nn.Module.to(vae, device=where, dtype=precision)  # that of diffusers logs a line about dtypes
        self.format = LatentFormat.from_vae(vae)
        """How latents become raw latents, and raw ones latents, as the checkpoint says."""
        self.assumed = ""
        """What `from_pretrained` had to assume about a single file, which plans print. It is empty where that was
        nothing."""
        self.vae = vae
        self.picture_channels = _picture_channels(vae, self.way)
        """The channels of its pictures: 3 for RGB, or 4 for RGBA, whose alpha is not premultiplied."""
        self.memory_limit = None if memory_limit is None else parse_memory_limit(memory_limit)
        """How many bytes a call may add above the loaded weights. None: what is free."""
        exact, reference, preview = self.engines
        self.engine: Exact | Reference | Preview
        if engine == "exact":
            self.engine = exact(
                vae, kernels=kernels, memory_limit=self.memory_limit, spill_dir=spill_dir, cuda_graphs=cuda_graphs,
                keep_memory=keep_memory,
            )  # fmt: skip
        elif engine == "preview":
            self.engine = preview(vae, memory_limit=self.memory_limit)
        else:
            self.engine = reference(vae, tiling=tiling, slicing=slicing)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        family: str | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> Self:
        """Load the half of a VAE that this class needs, and nothing of the other, and make an instance of it.

        Args:
            source: one of these (docs/models.md):
                ``"demo"``, which ships in the package;
                a diffusers VAE folder, its ``config.json`` or its weights file;
                a pipeline folder that holds ``vae/``;
                a single file of a VAE or of a whole model, whose tensors have diffusers' or BFL's names behind any
                prefix: safetensors, or a ``.pt``, ``.ckpt`` or ``.bin`` that holds only tensors, also as 8-bit floats,
                scaled or not;
                a folder that holds one such file;
                a hub id.
            subfolder: where the VAE is in the folder or repository. ``vae`` is found without it.
            revision: the branch, tag or commit of the hub id.
            variant: ``"fp16"`` or ``"bf16"``, of the folder or repository. If it is left out, the weights without a
                variant are meant, or the only ones that are there.
            family: whose VAE a single file holds: ``"flux1"``, ``"sd3"``, ``"sd"``, ``"sdxl"``, ``"playground-v2.5"``,
                ``"sd-x4-upscaler"``, ``"flux2"``, ``"ernie"`` or ``"qwen-image"`` (Wan 2.1's too). No tensor
                tells FLUX.1's from SD3's, SD's from SDXL's or FLUX.2's from ERNIE's. If it is left out, the first of
                such a pair is assumed with an `AssumedFamilyWarning`, and a plan says so. For a folder it is used
                instead of what the config says.
            scaling_factor, shift_factor, batch_norm_eps: belong to the checkpoint's latents, and are used instead of
                its family's or its config's. Both factors (for VAEs of SD's kind the first) settle a single file too.
            device: ``"auto"`` is the current GPU where there is one, and the CPU elsewhere.
            dtype: ``"auto"`` is bfloat16 on NVIDIA GPUs from compute capability 8.0 on, and float32 elsewhere.
            options: as for the class itself.

        Raises:
            CheckpointError: the weights are missing, damaged, foreign or out of reach.
            InvalidOptionError: an option is unknown, or the engine cannot honour it, or the family does not fit the
                tensors.
        """
        refuse_to_hang()
        where = resolve_device(device)
        precision = resolve_dtype(dtype, where)
        with set_aside(where):
            checkpoint = open_checkpoint(
                source,
                way=cls.way,
                subfolder=subfolder,
                revision=revision,
                variant=variant,
                family=family,
                scaling_factor=scaling_factor,
                shift_factor=shift_factor,
                batch_norm_eps=batch_norm_eps,
            )
            checkpoint.warn()
            # The method is that of torch.nn.Module, because diffusers' own logs a line about dtypes.
            vae = torch.nn.Module.to(checkpoint.load(precision), device=where)
            half = cls(vae, **options)
        half.assumed = checkpoint.assumed
        return half

    @property
    def device(self) -> torch.device:
        """Where the VAE is, where what is given is moved to, and where results are."""
        device: torch.device = self.vae.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the VAE, in which it computes and returns results."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @property
    def approximate(self) -> bool:
        """Whether the results are previews by an ``AutoencoderTiny`` rather than those of the full VAE."""
        return self.format.preview

    def prepare(self) -> float:
        """Compile the kernels and load the libraries' code now rather than in the first call.

        On a CPU this takes some seconds once per machine, because Numba keeps the result, and then about one second per
        process. The code, 20 to 65 MB, counts against no memory limit; a first call that was not prepared for adds
        it. On a GPU every kernel is also tried on a small map, and a plan names those that do not work there.

        Returns:
            The seconds that it took.
        """
        with set_aside(self.device):
            return self.engine.prepare()

    def _begin(self, note: str) -> None:
        """Do what comes before every call: warn of a preview, and see whether the model can still be used."""
        if self.approximate:
            warnings.warn(f"{self.way.name}: {note}", ApproximateWarning, stacklevel=3)  # the caller of a public method
        self.engine.look()

    def _plan(self, height: int, width: int, batch: int) -> Plan:
        scale = self.format.vae_scale_factor
        check_size(height, width, batch, scale)
        given = (height // scale, width // scale) if self.way == DECODE else (height, width)
        plan = self.engine.plan(*given, batch)
        notes = "; ".join(note for note in (plan.kernels_note, self.assumed) if note)
        return dataclasses.replace(plan, kernels_note=notes)


def _picture_channels(vae: VAE, way: Way) -> int:
    """The channels that one half of a VAE gives or takes, by its own weights: a config may not say them.

    Raises:
        InvalidOptionError: they are neither those of RGB nor those of RGBA.
    """
    kinds = (torch.nn.Conv2d, torch.nn.Conv3d)
    convolutions = [module for module in getattr(vae, way.network).modules() if isinstance(module, kinds)]
    channels = convolutions[-1].out_channels if way == DECODE else convolutions[0].in_channels
    if channels not in (3, 4):
        raise InvalidOptionError(
            f"vae: got a {type(vae).__name__} for pictures of {channels} channels; expected 3, for RGB, or 4, for RGBA"
        )
    return channels
