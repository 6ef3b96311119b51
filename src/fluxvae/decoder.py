"""`Decoder`: packed FLUX latents in, the image diffusers' FluxPipeline would have made out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from fluxvae.checkpoint import load_vae
from fluxvae.engine.exact import ExactEngine
from fluxvae.engine.plan import Plan, parse_memory_limit
from fluxvae.engine.reference import ReferenceEngine
from fluxvae.errors import InvalidLatentsError, InvalidOptionError, MemoryLimitError
from fluxvae.images import OutputType, check_output_type, postprocess, postprocess_bytes
from fluxvae.latents import LatentFormat, unpack_latents

__all__ = ["Decoder"]

Progress = Callable[[int, int], None]
Cancel = Callable[[], bool]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Decoder:
    """Decodes FLUX latents with one VAE on one device.

    Args:
        vae: an ``AutoencoderKL`` already in memory; it is used as it is, without a copy. `from_pretrained` loads one.
        device: ``"auto"`` (where the module is), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a ``torch.device``.
        dtype: ``"auto"`` (the module's own), ``"float32"``, ``"bfloat16"``, ``"float16"``, or a ``torch.dtype``. A
            device or dtype other than the module's moves the module itself, as ``Module.to`` does.
        engine: ``"exact"``, the untiled image in bounded memory, the same bits in any batch; or ``"diffusers"``, the
            reference, whose bits are FluxPipeline's.
        kernels: of the exact engine: ``"auto"`` is the fastest for the device; a plan names it.
        memory_limit: of the exact engine: bytes, or ``"2GiB"`` or ``"0.7GB"``: what a decode may add above the loaded
            weights. None: what is free when it starts, less a margin.
        spill_dir: of the exact engine: a folder on a disk for what the limit leaves no room for.
        tiling, slicing: of the reference engine: diffusers' own. Tiling blends overlapping tiles and is not the
            untiled image: it shows seams and shifts colours.

    Raises:
        InvalidOptionError: an option that is unknown or that the engine cannot honour.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        engine: str = "exact",
        kernels: str = "auto",
        memory_limit: int | str | None = None,
        spill_dir: str | Path | None = None,
        tiling: bool = False,
        slicing: bool = False,
    ) -> None:
        if not isinstance(vae, AutoencoderKL):
            raise InvalidOptionError(
                f"vae: got {type(vae).__name__}, expected diffusers' AutoencoderKL; Decoder.from_pretrained loads one"
            )
        exact_options: dict[str, object] = {"kernels": kernels, "memory_limit": memory_limit, "spill_dir": spill_dir}
        _check_engine(engine, exact_options, {"tiling": tiling, "slicing": slicing})
        where = vae.device if device == "auto" else _device(device)
        precision = vae.dtype if dtype == "auto" else _dtype(dtype, where)
        if (vae.device, vae.dtype) != (where, precision):
            vae.to(device=where, dtype=precision)
        self.format = LatentFormat.from_config(vae.config)
        """How latents become raw latents: read from the checkpoint."""
        self.vae = vae
        self.memory_limit = None if memory_limit is None else parse_memory_limit(memory_limit)
        """Bytes a decode may add above the loaded weights; None: what is free."""
        self.engine: ExactEngine | ReferenceEngine
        if engine == "exact":
            self.engine = ExactEngine(vae, kernels=kernels, memory_limit=self.memory_limit, spill_dir=spill_dir)
        else:
            self.engine = ReferenceEngine(vae, tiling=tiling, slicing=slicing)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> Decoder:
        """Load a VAE and make a decoder of it.

        Args:
            source: ``"demo"`` (ships in the package), a diffusers VAE folder, a pipeline folder that holds ``vae/``,
                a single ``.safetensors`` file with BFL's key names, or a hub id.
            subfolder: of the folder or repository.
            revision: of the hub id: branch, tag or commit.
            device: ``"auto"`` is CUDA where there is a GPU, else the CPU.
            dtype: ``"auto"`` is bfloat16 on CUDA, float32 on a CPU.
            options: as for `Decoder`.

        Raises:
            CheckpointError: the weights are missing, damaged, foreign or out of reach.
            InvalidOptionError: an option that is unknown or that the engine cannot honour.
        """
        where = _device(device)
        precision = _dtype(dtype, where)
        vae = load_vae(source, subfolder=subfolder, revision=revision, dtype=precision)
        return cls(vae, device=where, dtype=precision, **options)

    @property
    def device(self) -> torch.device:
        """Where the VAE is, and where latents are moved."""
        device: torch.device = self.vae.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The VAE's dtype, which latents are cast to before they are rescaled."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    def prepare(self) -> float:
        """Compile the engine's kernels now rather than in the first decode; seconds it took.

        On a CPU that is some seconds once per machine (Numba keeps the result), then about one per process.
        """
        return self.engine.prepare()

    def decode(
        self,
        latents: torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "pil",
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Any:
        """Decode latents to images.

        Args:
            latents: packed (B, gh*gw, 64) with height and width, or unpacked (B, 16, lh, lw); float32, bfloat16 or
                float16; finite; scaled, as the transformer leaves them.
            height, width: pixels. A size that is not a multiple of 16 is floored, as FluxPipeline does, with a
                `SizeFlooredWarning`. Height and width exchanged cannot be noticed where both give the same number of
                patches: 512x1024 latents decode as 1024x512 without an error, to a scrambled picture.
            output_type: ``"pil"``: list of pictures; ``"np"``: (B, H, W, 3) float32 in [0, 1]; ``"pt"``: (B, 3, H, W)
                in [0, 1], the VAE's dtype; ``"uint8"``: (B, H, W, 3) uint8 array, the bytes of ``"pil"``.
            scaling_factor, shift_factor: instead of the checkpoint's own.
            progress: called with (done, total).
            cancel: asked as the work goes on; true stops it.

        Raises:
            InvalidLatentsError, InvalidOptionError: before any work.
            NonFiniteOutputError: the pixels would hold NaN or Inf.
            DecodeCancelled: cancel() said so.
        """
        check_output_type(output_type)
        if self.memory_limit is not None:
            self._check_output(output_type, latents.shape[0], *self.check(latents, height=height, width=width))
        image = self.decode_raw(
            latents,
            height=height,
            width=width,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            progress=progress,
            cancel=cancel,
        )
        return postprocess(image, output_type)

    def decode_raw(
        self,
        latents: torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """As `decode`, without post-processing: for callers that need several output types of one decode.

        Returns:
            (B, 3, H, W), the VAE's dtype, on its device, nominally [-1, 1], not clamped.
        """
        height, width = self.format.check(latents, height, width)
        # Cast first: FluxPipeline's latents are in the VAE's dtype when it rescales them.
        latents = latents.to(device=self.device, dtype=self.dtype)
        if latents.ndim == 3:
            latents = unpack_latents(latents, height, width, vae_scale_factor=self.format.vae_scale_factor)
        raw = self.format.to_raw(latents, scaling_factor, shift_factor)
        return self.engine.decode(raw, progress=progress, cancel=cancel)

    def _check_output(self, output_type: OutputType, batch: int, height: int, width: int) -> None:
        """The engine plans for itself; what it returns and what `postprocess` makes of that must fit too."""
        assert self.memory_limit is not None
        itemsize = self.dtype.itemsize
        needed = batch * 3 * height * width * itemsize
        needed += postprocess_bytes(output_type, batch, height, width, itemsize)
        if needed > self.memory_limit:
            raise MemoryLimitError(
                f"memory_limit: got {self.memory_limit} bytes; {batch} x {height}x{width} pixels as {output_type!r} "
                f"take {needed} bytes by themselves; raise the limit, decode fewer at a time, or ask for 'uint8'"
            )

    def check(self, latents: torch.Tensor, *, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Validate one request without decoding it.

        Returns:
            (height, width) in pixels that `decode` would give.

        Raises:
            InvalidLatentsError: as `decode` would.
        """
        return self.format.check(latents, height, width)

    def plan(self, height: int, width: int, batch: int = 1) -> Plan:
        """How ``batch`` images of this size would be decoded now; ``str(plan)`` is a table that explains itself.

        Args:
            height, width: pixels, multiples of 8.

        Raises:
            InvalidLatentsError: a size that no latents decode to.
            MemoryLimitError: the limit is below the smallest that works.
            InvalidOptionError: the reference engine does not plan.
        """
        scale = self.format.vae_scale_factor
        for name, value in (("height", height), ("width", width), ("batch", batch)):
            multiple = 1 if name == "batch" else scale
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % multiple:
                raise InvalidLatentsError(f"{name}: got {value!r}, expected a positive multiple of {multiple}")
        return self.engine.plan(height // scale, width // scale, batch)


def _check_engine(engine: str, exact: dict[str, object], diffusers: dict[str, object]) -> None:
    """Refuse an unknown engine, and options of the other one: none is ignored."""
    if engine not in ("exact", "diffusers"):
        raise InvalidOptionError(f"engine: got {engine!r}, expected 'exact' or 'diffusers'")
    others, other = (diffusers, "diffusers") if engine == "exact" else (exact, "exact")
    for name, value in others.items():
        if value not in (None, False, "auto"):
            raise InvalidOptionError(
                f"{name}: got {value!r} with engine={engine!r}, which cannot honour it; it is for engine={other!r}"
            )


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidOptionError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOptionError(
            f"device: got {device!r}, but this PyTorch sees no CUDA GPU; use device='cpu', or install a CUDA build"
        )
    if found.index is not None and found.type == "cuda" and found.index >= torch.cuda.device_count():
        raise InvalidOptionError(f"device: got {device!r}, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
    return found


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise InvalidOptionError(f"dtype: got {dtype!r}, expected 'auto', {', '.join(map(repr, _DTYPES))}")
    return found
