"""Modular pipelines of diffusers with fluxvae's steps: the real ones, against the same with diffusers' own steps.

The text encoders are left out, and transformers and VAEs are tiny and random. Servers: tests/serve/test_family.py.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.modular_pipelines.flux.decoders import FluxDecodeStep
from diffusers.modular_pipelines.flux2.decoders import Flux2DecodeStep
from diffusers.modular_pipelines.qwenimage21.decoders import QwenImage21DecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep

import fluxvae
from engine_models import one_thread
from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, InvalidOptionError, MemoryLimitError
from fluxvae.diffusers_blocks import LocalVaeStep, RemoteVaeStep
from fluxvae.errors import DecodeCancelled, NonFiniteOutputError
from fluxvae.verify.tolerances import EXACT_VS_REFERENCE_LEVELS
from modular_pipelines import FAMILIES, blocks_of, picture, pipeline, run, vae_of

__all__ = ["one_thread"]  # a fixture, found by its name
pytestmark = pytest.mark.usefixtures("one_thread")

families = pytest.mark.parametrize("family", FAMILIES)
SIZE = {"height": 48, "width": 80}
FOUND = {
    "FluxAutoBlocks": ["vae_encoder.img2img.encode", "decode"],
    "FluxKontextAutoBlocks": ["vae_encoder.image_conditioned.encode", "decode"],
    "Flux2AutoBlocks": ["vae_encoder.img_conditioning.encode", "decode"],
    "Flux2KleinAutoBlocks": ["vae_encoder.img_conditioning.encode", "decode"],
    "Flux3AutoBlocks": ["vae_encoder.image_conditioning.encode", "decode"],
    "Flux3DistilledAutoBlocks": ["vae_encoder.image_conditioning.encode", "decode"],
    "ZImageAutoBlocks": ["vae_encoder.vae_encoder", "decode"],
    "Ideogram4AutoBlocks": ["decode"],
}
"""Where the steps with a VAE are."""


def same(mine: Any, theirs: Any) -> bool:
    """Whether two outputs of a pipeline, of any type, have the same bits."""
    if isinstance(theirs, torch.Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    if isinstance(theirs, np.ndarray):
        return np.array_equal(mine, theirs)
    if isinstance(theirs, (list, tuple)):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == theirs  # pictures of PIL, boxes, None


def close(mine: Any, theirs: Any, atol: float) -> bool:
    if isinstance(theirs, list):
        return all(close(one, other, atol) for one, other in zip(mine, theirs, strict=True))
    return torch.allclose(mine, theirs, rtol=0, atol=atol)


def wrapped(blocks: Any, kind: type = LocalVaeStep, before: str = "") -> dict[str, Any]:
    """Every step of a kind in a tree of blocks, by its path."""
    found = {before.rstrip("."): blocks} if isinstance(blocks, kind) else {}
    for name, inner in blocks.sub_blocks.items():
        found |= wrapped(inner, kind, f"{before}{name}.")
    return found


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_text_to_image(family: str, dtype: torch.dtype) -> None:
    """A batch of two images of 48x80, by the whole pipeline from the embeddings on."""
    vae, blocks = vae_of(family, dtype), blocks_of(family)
    options = {**SIZE, "num_images_per_prompt": 2, "output_type": "pt"}
    own = run(pipeline(family, blocks, vae), family, **options)
    assert own.shape == (2, 3, 48, 80)
    theirs = LocalVaeStep.replace_all(blocks, engine="diffusers")
    assert same(run(pipeline(family, theirs, vae), family, **options), own)
    exact = run(pipeline(family, LocalVaeStep.replace_all(blocks, memory_limit="1GiB"), vae), family, **options)
    assert exact.dtype == dtype
    assert not torch.equal(exact, own), "another engine computed it"
    levels = EXACT_VS_REFERENCE_LEVELS[str(dtype).removeprefix("torch.")].bound
    assert close(exact.float(), own.float(), levels / 255)
    assert "_decode" not in vae.__dict__, "the pipeline's own VAE is untouched"


@families
def test_image_to_image(family: str) -> None:
    """What the steps encode, in whatever form they hand it on, and the image that is made of it."""
    vae, blocks = vae_of(family), blocks_of(family)
    names = ["images", "image_latents", "image_cond_latents", "reference_crop"]
    image = [picture(), picture(80, 64)] if family == "Flux2" else picture()
    options = {"image": image, "output_type": "pt", **({} if family in ("Flux2", "Flux3") else SIZE)}
    own = run(pipeline(family, blocks, vae), family, names, **options)
    assert (own["reference_crop"] is not None) == (family == "Flux3")
    if family == "Flux3":
        assert own["images"].shape == (1, 3, 90, 70), "cropped back to the reference"
    theirs = LocalVaeStep.replace_all(blocks, engine="diffusers")
    assert same(list(run(pipeline(family, theirs, vae), family, names, **options).values()), list(own.values()))
    exact = run(pipeline(family, LocalVaeStep.replace_all(blocks), vae), family, names, **options)
    for name in ("images", "image_latents", "image_cond_latents"):
        if own[name] is not None:
            assert not same(exact[name], own[name])
            assert close(exact[name], own[name], 2e-3)


@pytest.mark.parametrize(
    ("family", "output_type"),
    [("Flux", "latent"), *((family, output_type) for family in FAMILIES for output_type in ("pil", "np", "pt"))],
)
def test_every_output_type(family: str, output_type: str) -> None:
    """The step alone, on latents of an odd grid, as after a denoiser in another process."""
    vae, step = vae_of(family), blocks_of(family).sub_blocks["decode"]
    shape = (2, 128, 3, 5) if family in ("Flux2", "Flux3") else (2, 16, 6, 10)
    inputs: dict[str, Any] = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    if family == "Flux3":
        inputs["reference_crop"] = [(3, 1, 70, 40)]

    def decoded(step: Any) -> Any:
        pipe = step.init_pipeline()
        pipe.update_components(vae=vae)
        return pipe(**inputs, output_type=output_type, output="images")

    assert same(decoded(LocalVaeStep(step, engine="diffusers")), decoded(step))
    if output_type == "np":
        difference = np.abs(decoded(LocalVaeStep(step)) - decoded(step))
        assert 0 < difference.max() <= EXACT_VS_REFERENCE_LEVELS["float32"].bound / 255


@pytest.mark.parametrize("name", FOUND)
def test_every_step_with_a_vae_is_found(name: str) -> None:
    """In a copy: most inner blocks belong to all pipelines of the family."""
    blocks = getattr(diffusers, name)()
    mine = LocalVaeStep.replace_all(blocks, memory_limit=10**9)
    assert list(wrapped(mine)) == FOUND[name]
    assert not wrapped(blocks)
    assert not wrapped(getattr(diffusers, name)())
    for attribute in ("inputs", "intermediate_outputs", "expected_components", "required_inputs", "model_name"):
        assert str(getattr(mine, attribute)) == str(getattr(blocks, attribute)), attribute
    there = RemoteVaeStep.replace_all(mine, "localhost:1")  # fluxvae's own steps are replaced too
    assert list(wrapped(there, RemoteVaeStep)) == FOUND[name]
    names = [spec.name for spec in there.expected_components]
    assert names == [spec.name for spec in blocks.expected_components if spec.name != "vae"]


def test_a_step_of_ones_own_pipeline() -> None:
    """Put where the original was, as any block of diffusers is."""
    blocks = blocks_of("Flux2")
    blocks.sub_blocks["decode"] = LocalVaeStep(blocks.sub_blocks["decode"], engine="diffusers")
    vae = vae_of("Flux2")
    mine = run(pipeline("Flux2", blocks, vae), "Flux2", **SIZE, output_type="pt")
    assert same(mine, run(pipeline("Flux2", blocks_of("Flux2"), vae), "Flux2", **SIZE, output_type="pt"))


def decode(step: Any, vae: Any, latents: torch.Tensor | None = None) -> Any:
    pipe = step.init_pipeline()
    if vae is not None:
        pipe.update_components(vae=vae)
    latents = torch.zeros(1, 128, 3, 5) if latents is None else latents
    return pipe(latents=latents, output_type="pt", output="images")


def test_progress_and_cancel() -> None:
    """Also those that cannot be copied: a pipeline copies its blocks."""
    vae, seen, stop = flux2_vae(), [], threading.Event()
    step = LocalVaeStep(Flux2DecodeStep(), progress=lambda done, total: seen.append((done, total)), cancel=stop.is_set)
    decode(step, vae)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 1
    stop.set()
    for engine in ("exact", "diffusers"):
        with pytest.raises(DecodeCancelled):
            decode(LocalVaeStep(Flux2DecodeStep(), engine=engine, cancel=stop.is_set), vae)


def test_hooks_of_the_vae_run() -> None:
    """Offloading is such a hook: it brings the weights before the VAE decodes."""
    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    vae = flux2_vae()
    before = decode(LocalVaeStep(Flux2DecodeStep()), vae)
    add_hook_to_module(vae, Hook())
    assert same(decode(LocalVaeStep(Flux2DecodeStep()), vae), before)
    assert calls


def test_threads_share_a_vae() -> None:
    """Each call decodes with a copy of its own, so none meets the other's methods."""
    vae, found = flux2_vae(), {}
    barrier = threading.Barrier(2)

    def meet(done: int, total: int) -> None:
        if done == 0:
            barrier.wait(timeout=60)

    def work(index: int) -> None:
        found[index] = decode(LocalVaeStep(Flux2DecodeStep(), progress=meet), vae)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(found[0], found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "preview"}, "engine: got 'preview'"),
        ({"memory_limit": "much"}, "memory_limit: got 'much'"),
        ({"memory_limit": "1GiB", "engine": "diffusers"}, "memory_limit: got 1073741824 with engine='diffusers'"),
        ({"kernels": "fast"}, "kernels: got 'fast'"),
        ({"spill_dir": "/nowhere/at/all"}, "spill_dir: got"),
        ({"progress": 1}, "progress: got int"),
        ({"cancel": "no"}, "cancel: got str"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_are_refused_when_the_step_is_made(options: dict[str, Any], message: str) -> None:
    for make in (LocalVaeStep, LocalVaeStep.replace_all):
        with pytest.raises(InvalidOptionError, match=message):
            make(Flux2DecodeStep(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://box:8001"}, "url: got 'http://box:8001'"),
        ({"url": 8001}, "url: got int"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"protocol": "smtp"}, "protocol: got 'smtp'"),
        ({"timeout_s": 0}, "timeout_s: got 0"),
    ],
    ids=str,
)
def test_options_of_a_server_are_refused_when_the_step_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        RemoteVaeStep(Flux2DecodeStep(), **{"url": "localhost:1", **options})


def test_steps_that_are_refused() -> None:
    blocks = blocks_of("Flux2")
    with pytest.raises(
        InvalidOptionError, match="step: got QwenImage21DecodeStep, whose vae is AutoencoderKLQwenImage21"
    ):
        LocalVaeStep(QwenImage21DecodeStep())
    with pytest.raises(InvalidOptionError, match=r"step: got the class .* make a step of it: Flux2DecodeStep\(\)"):
        LocalVaeStep(Flux2DecodeStep)
    with pytest.raises(InvalidOptionError, match="step: got Flux2AutoBlocks, which holds other blocks"):
        LocalVaeStep(blocks)
    with pytest.raises(InvalidOptionError, match="step: got a LocalVaeStep, which is fluxvae's already"):
        LocalVaeStep(LocalVaeStep(Flux2DecodeStep()))
    unpack = blocks.sub_blocks["denoise"].sub_blocks["text2image"].sub_blocks["after_denoise"]
    with pytest.raises(InvalidOptionError, match="step: got Flux2UnpackLatentsStep, which uses no component vae"):
        LocalVaeStep(unpack)
    with pytest.raises(InvalidOptionError, match="blocks: got Flux2AutoCoreDenoiseStep, in which no step uses"):
        LocalVaeStep.replace_all(blocks.sub_blocks["denoise"])
    with pytest.raises(InvalidOptionError, match="blocks: got str"):
        LocalVaeStep.replace_all("decode")
    with pytest.raises(
        InvalidOptionError, match="step: got StableDiffusionXLDecodeStep, which is none of flux, z_image"
    ):
        RemoteVaeStep(StableDiffusionXLDecodeStep(), "localhost:1")


def test_what_only_the_vae_tells() -> None:
    """Refused by name when the step runs."""
    step = LocalVaeStep(Flux2DecodeStep())
    with pytest.raises(InvalidOptionError, match="vae: got NoneType, expected diffusers' AutoencoderKL, "):
        decode(step, None)
    with pytest.raises(InvalidOptionError, match="vae: got AutoencoderTiny, expected diffusers' AutoencoderKL, "):
        decode(LocalVaeStep(FluxDecodeStep(), engine="diffusers"), tiny_vae(), torch.zeros(1, 16, 4, 4))
    with pytest.raises(MemoryLimitError):
        decode(LocalVaeStep(Flux2DecodeStep(), memory_limit=1000), flux2_vae())
    tiled = flux2_vae()
    tiled.enable_tiling()
    for engine in ("exact", "diffusers"):
        with pytest.raises(InvalidOptionError, match="use_tiling: got True"):
            decode(LocalVaeStep(Flux2DecodeStep(), engine=engine), tiled)
    with pytest.raises(NonFiniteOutputError):
        decode(LocalVaeStep(Flux2DecodeStep(), engine="diffusers"), flux2_vae(), torch.full((1, 128, 3, 5), 3e38))
    installed = flux2_vae()
    with fluxvae.install(installed), pytest.raises(InvalidOptionError, match="has been replaced already"):
        decode(step, installed)


def test_ideogram_4_decodes_too() -> None:
    """It has FLUX.2's VAE, and takes its statistics in another order, which stays its own step's affair."""
    vae, step = flux2_vae(), diffusers.Ideogram4AutoBlocks().sub_blocks["decode"]
    latents = torch.randn(2, 32, 6, 10, generator=torch.Generator().manual_seed(3))
    own = decode(step, vae, latents)
    assert same(decode(LocalVaeStep(step, engine="diffusers"), vae, latents), own)
    order: dict[str, Any] = {"raw": False, "feature_order": "row_column_channel", "output_type": "pt"}
    assert same(decode(LocalVaeStep(step), vae, latents), Decoder(vae).decode(latents, **order))


def test_an_exact_step_is_the_library() -> None:
    vae = flux2_vae()
    latents = torch.randn(1, 128, 3, 5, generator=torch.Generator().manual_seed(3))
    step = copy.deepcopy(LocalVaeStep(Flux2DecodeStep(), kernels="torch"))
    assert same(decode(step, vae, latents), Decoder(vae, kernels="torch").decode(latents, output_type="pt"))
