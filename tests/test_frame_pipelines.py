"""VAEs with an axis of time: the reference engine's bits are those of the real pipelines, modular steps and classes.

The transformers are tiny and random, and the prompt embeddings are given; everything else is the pipelines' own code.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage21, AutoencoderKLWan, QwenImageLayeredPipeline, QwenImagePipeline
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.anima.decoders import AnimaVaeDecoderStep
from diffusers.modular_pipelines.anima.encoders import AnimaImg2ImgVaeEncoderStep
from diffusers.modular_pipelines.krea2.decoders import Krea2DecodeStep
from diffusers.modular_pipelines.qwenimage.decoders import QwenImageDecoderStep, QwenImageLayeredDecoderStep
from diffusers.modular_pipelines.qwenimage.encoders import QwenImageVaeEncoderStep
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus, pipeline_qwenimage_layered
from PIL import Image
from safetensors.torch import save_file

import fluxvae
from family_models import qwen_image_vae, wan_vae
from fluxvae import Decoder, Encoder, InvalidLatentsError, InvalidOptionError, pack_latents, unpack_latents
from fluxvae.batch import Job, decode_files
from fluxvae.diffusers_blocks import LocalVaeStep
from fluxvae.latents.format import LatentFormat
from frame_pipelines import last_latents, pipeline, run, seen_tokens

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SIZE = {"height": 32, "width": 48}
"""A grid of 2 x 3 patches, of 4 x 6 latents."""


def vae_of(name: str = "", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return (wan_vae if name == "Wan" else qwen_image_vae)(base_dim=8, dtype=dtype, **options)


def noise(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (SIZE["height"], SIZE["width"], len(mode)), np.uint8)
    return Image.fromarray(values, mode)


def decode(vae: Any, latents: torch.Tensor, **options: Any) -> Any:
    return Decoder(vae, engine="diffusers").decode(latents, output_type="pt", **options)


@DTYPES
@pytest.mark.parametrize("name", ["QwenImage", "Krea2", "NucleusMoEImage"])
def test_pipelines_of_packed_latents(name: str, dtype: torch.dtype) -> None:
    """Packed, unpacked as the pipeline itself unpacks them, and without the axis of time."""
    pipe = pipeline(name, vae_of(dtype=dtype))
    batch = 2 if name == "QwenImage" else 1
    tokens, expected = (run(pipe, kind, batch, **SIZE) for kind in ("latent", "pt"))
    assert tokens.shape == (batch, 6, 64)
    assert torch.equal(decode(pipe.vae, tokens, **SIZE), expected)
    frame = QwenImagePipeline._unpack_latents(tokens, *SIZE.values(), 8)
    assert torch.equal(unpack_latents(tokens, **SIZE), frame[:, :, 0])
    for latents in (frame, frame[:, :, 0]):
        assert torch.equal(decode(pipe.vae, latents), expected)
    if batch == 1:
        for latents in (tokens[0], frame[0], frame[0, :, 0]):
            assert torch.equal(decode(pipe.vae, latents, **SIZE), expected)


@DTYPES
def test_wan_pipeline_of_one_frame(dtype: torch.dtype) -> None:
    pipe = pipeline("Wan", vae_of("Wan", dtype))
    latents, expected = (run(pipe, kind, num_frames=1, **SIZE) for kind in ("latent", "pt"))
    assert latents.shape == (1, 16, 1, 4, 6)
    assert torch.equal(decode(pipe.vae, latents), expected[:, 0])


@DTYPES
def test_layers_are_pictures(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline drops the composite in front. It cuts a batch at the wrong places, so its pictures are compared."""
    monkeypatch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", lambda area, ratio: (48, 32))
    pipe = pipeline("QwenImageLayered", vae_of(channels=4, dtype=dtype))
    batch = 2 if dtype == torch.float32 else 1
    given = {"image": picture("RGBA"), "layers": 2, "batch": batch}
    tokens, expected = last_latents(pipe, **given), torch.cat(list(run(pipe, "pt", **given)))
    assert tokens.shape == (batch, 3 * 6, 64)
    assert expected.shape == (batch * 2, 4, 32, 48)
    assert torch.equal(decode(pipe.vae, tokens[:, 6:], **SIZE), expected)
    frames = QwenImageLayeredPipeline._unpack_latents(tokens, *SIZE.values(), 2, 8)
    assert torch.equal(decode(pipe.vae, frames[:, :, 1:]), expected)
    decoder = Decoder(pipe.vae, engine="diffusers", slicing=True)
    every = decoder.decode(frames, output_type="pt")
    assert torch.equal(every, decoder.decode(tokens, **SIZE, output_type="pt"))
    one = decoder.decode(frames[-1:, :, -1:], output_type="pt")
    assert torch.equal(every[-1:], one), "the composite is decoded where it is given, and nothing is left out"


def step_of(step: Any, vae: Any, output: str, **inputs: Any) -> Any:
    pipe = SequentialPipelineBlocks.from_blocks_dict({"step": step}).init_pipeline()
    pipe.update_components(vae=vae)
    pipe.__dict__["transformer"] = None  # Anima's step that encodes looks whether there is one
    return pipe(**inputs, output=output)


@DTYPES
@pytest.mark.parametrize("make", [AnimaVaeDecoderStep, QwenImageDecoderStep, Krea2DecodeStep])
def test_modular_steps_that_decode(make: Any, dtype: torch.dtype) -> None:
    vae, latents = vae_of(dtype=dtype), noise(1, 16, 1, 4, 6)
    inputs = {"latents": latents, "output_type": "pt"} if make is Krea2DecodeStep else {"latents": latents}
    own = step_of(make(), vae, "images", **copy.deepcopy(inputs))
    assert torch.equal(step_of(LocalVaeStep(make(), engine="diffusers"), vae, "images", **inputs), own)
    decoder = Decoder(vae, engine="diffusers")
    mine = decoder.decode(latents, output_type="pt") if make is Krea2DecodeStep else decoder.decode_raw(latents)
    assert torch.equal(mine, own)


def test_the_modular_step_that_decodes_layers() -> None:
    vae, latents = vae_of(channels=4), noise(2, 16, 3, 4, 6)
    own = step_of(QwenImageLayeredDecoderStep(), vae, "images", latents=latents, output_type="pt")
    step = LocalVaeStep(QwenImageLayeredDecoderStep(), engine="diffusers")
    ours = step_of(step, vae, "images", latents=latents, output_type="pt")
    assert all(torch.equal(one, other) for one, other in zip(ours, own, strict=True))
    assert torch.equal(decode(vae, latents[:, :, 1:]), torch.cat(own))


@DTYPES
def test_modular_steps_that_encode(dtype: torch.dtype) -> None:
    vae, image = vae_of(dtype=dtype), picture()
    own = step_of(AnimaImg2ImgVaeEncoderStep(), vae, "image_latents", image=image, **SIZE)
    pixels = 2 * torch.from_numpy(np.asarray(image) / np.float32(255)).movedim(2, 0)[None] - 1
    assert torch.equal(step_of(QwenImageVaeEncoderStep(), vae, "image_latents", processed_image=pixels), own)
    step = LocalVaeStep(AnimaImg2ImgVaeEncoderStep(), engine="diffusers")
    assert torch.equal(step_of(step, vae, "image_latents", image=image, **SIZE), own)
    encoder = Encoder(vae, engine="diffusers")
    assert torch.equal(encoder.encode(image, packed=False).unsqueeze(2), own)


@DTYPES
def test_editing_takes_the_mode(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (48, 32))
    pipe, image = pipeline("QwenImageEditPlus", vae_of(dtype=dtype)), picture()
    reference = seen_tokens(pipe, image=[image, image.rotate(180)], **SIZE)[:, 6:]
    encoder = Encoder(pipe.vae, engine="diffusers")
    ours = [encoder.encode(one) for one in (image, image.rotate(180))]
    assert torch.equal(torch.cat(ours, dim=1), reference)
    assert torch.equal(pack_latents(encoder.encode(image, packed=False)), ours[0])


@DTYPES
def test_image_to_image_draws(dtype: torch.dtype) -> None:
    """It multiplies by the reciprocal of the deviation, whose last bits are others than those of a division."""
    pipe, image = pipeline("QwenImageImg2Img", vae_of(dtype=dtype)), picture()
    pixels = pipe.image_processor.preprocess(image).to(dtype).unsqueeze(2)
    expected = pipe._encode_vae_image(pixels, torch.Generator().manual_seed(4))[:, :, 0]
    encoder = Encoder(pipe.vae, engine="diffusers")
    latents = encoder.encode(image, packed=False, sample=torch.Generator().manual_seed(4))
    assert torch.equal(latents, expected)
    moments = torch.cat([noise(1, 16, 4, 6, dtype=dtype), torch.full((1, 16, 4, 6), -30.0, dtype=dtype)], dim=1)
    mode = encoder.format.from_raw(moments[:, :16])
    assert not torch.equal(encoder.format.from_raw(moments[:, :16], drawn=True), mode)


@pytest.mark.parametrize(("tiling", "slicing"), [(True, False), (False, True)], ids=["tiling", "slicing"])
@pytest.mark.parametrize("name", ["QwenImage", "Wan"])
def test_tiling_and_slicing_are_diffusers_own(name: str, tiling: bool, slicing: bool) -> None:
    vae, raw, images = vae_of(name), noise(2, 16, 4, 5), noise(2, 3, 32, 40).clamp(0, 1)
    vae.tile_sample_min_height = vae.tile_sample_min_width = 24
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 16
    vae.use_tiling, vae.use_slicing = tiling, slicing
    decoded, mode = of_the_class(vae, raw, images)
    vae.use_tiling = vae.use_slicing = False
    options: dict[str, Any] = {"engine": "diffusers", "tiling": tiling, "slicing": slicing}
    assert torch.equal(Decoder(vae, **options).decode_raw(raw, raw=True), decoded)
    assert torch.equal(Encoder(vae, **options).encode(images, packed=False, raw=True), mode)
    if tiling:
        assert not torch.equal(of_the_class(vae, raw, images)[0], decoded)


def of_the_class(vae: Any, raw: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels and the mode of the latents, by diffusers' own class."""
    with torch.no_grad():
        mode = vae.encode((2 * images - 1).unsqueeze(2)).latent_dist.mode()[:, :, 0]
        return vae.decode(raw.unsqueeze(2)).sample[:, :, 0], mode


@pytest.mark.parametrize("name", ["QwenImage", "Wan"])
def test_a_half_that_was_not_loaded_is_not_needed(name: str) -> None:
    """diffusers' own class counts the layers of both before every call."""
    vae, raw, images = vae_of(name), noise(1, 16, 4, 5), noise(1, 3, 32, 40).clamp(0, 1)
    decoded, mode = of_the_class(vae, raw, images)
    alone = {part: copy.deepcopy(vae) for part in ("encoder", "decoder")}
    for part, one in alone.items():
        setattr(one, part, None)
    assert torch.equal(Decoder(alone["encoder"], engine="diffusers").decode_raw(raw, raw=True), decoded)
    latents = Encoder(alone["decoder"], engine="diffusers").encode(images, packed=False, raw=True)
    assert torch.equal(latents, mode)
    assert all(getattr(one, part) is None for part, one in alone.items())


def test_calls_in_two_threads_do_not_see_each_others_frames() -> None:
    """Such a VAE keeps frames in attributes of its own meanwhile. The threads meet where it would share them."""
    vae, raw = vae_of(), noise(2, 16, 4, 6)
    expected = [Decoder(vae, engine="diffusers").decode_raw(one[None], raw=True) for one in raw]
    begun, first_is_done, found = threading.Barrier(2, timeout=60), threading.Event(), {}

    def after_the_caches_are_cleared(*_: Any) -> None:
        begun.wait()

    def before_the_first_layer(*_: Any) -> None:
        begun.wait()
        if threading.current_thread().name == "second":
            assert first_is_done.wait(60)

    def work(index: int) -> None:
        found[index] = Decoder(vae, engine="diffusers").decode_raw(raw[index : index + 1], raw=True)
        first_is_done.set()

    vae.post_quant_conv.register_forward_hook(after_the_caches_are_cleared)
    vae.decoder.conv_in.register_forward_pre_hook(before_the_first_layer)
    threads = [threading.Thread(target=work, args=(i,), name=name) for i, name in enumerate(("first", "second"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [torch.equal(found[i], expected[i]) for i in range(2)] == [True, True]


def test_what_is_refused() -> None:
    decoder, layered = Decoder(vae_of(), engine="diffusers"), Decoder(vae_of(channels=4), engine="diffusers")
    for shape in ((1, 16, 5, 4, 6), (16, 5, 4, 6)):
        with pytest.raises(InvalidLatentsError, match="video of 5 frames"):
            decoder.decode(torch.zeros(shape))
    with pytest.raises(InvalidLatentsError, match="a grid of 2 x 3 = 6 patches .* but the latents hold 12"):
        decoder.decode(torch.zeros(1, 12, 64), **SIZE)
    assert layered.check(torch.zeros(1, 12, 64), **SIZE) == (32, 48)
    with pytest.raises(InvalidLatentsError, match="a grid of 2 x 3 = 6 patches .* but the latents hold 13"):
        layered.decode(torch.zeros(1, 13, 64), **SIZE)
    with pytest.raises(InvalidLatentsError, match="5 layers of one image .* pass them with their batch"):
        layered.decode(torch.zeros(16, 5, 4, 6))
    for name in ("scaling_factor", "shift_factor", "batch_norm_eps"):
        said = {name: 1.0}
        with pytest.raises(InvalidOptionError, match=f"{name}: got 1.0; this checkpoint has latents_mean and"):
            decoder.decode(torch.zeros(1, 16, 4, 6), **said)
        with pytest.raises(InvalidOptionError, match=f"{name}: got 1.0; this checkpoint has latents_mean and"):
            Encoder(decoder.vae, engine="diffusers").encode(picture(), **said)
    with pytest.raises(InvalidOptionError, match="is_residual=True, patch_size=2, which is Wan 2.2's network"):
        Decoder(AutoencoderKLWan(base_dim=8, in_channels=12, out_channels=12, is_residual=True, patch_size=2))
    with pytest.raises(InvalidOptionError, match="got AutoencoderKLQwenImage21, expected diffusers' AutoencoderKL, "):
        Decoder(object.__new__(AutoencoderKLQwenImage21))


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_a_video_in_a_pipeline_is_refused(way: str) -> None:
    vae = vae_of("Wan")
    seen = LocalVaeStep(AnimaVaeDecoderStep(), engine="diffusers").vae_for(type("Components", (), {"vae": vae}))
    given = noise(1, 16, 2, 4, 6) if way == "decode" else noise(1, 3, 5, 32, 48)
    with torch.no_grad(), pytest.raises(InvalidOptionError, match=rf"to {way}, a video of \d frames; expected one"):
        getattr(seen, way)(given)
    with torch.no_grad(), pytest.raises(InvalidOptionError, match=f"to {way}; expected .batch, channels, frames"):
        getattr(seen, way)(given[:, :, 0])


def test_installed_in_a_pipeline() -> None:
    """The picture and the references are the exact engine's, and the pipeline's own again once it is removed."""
    pipe = pipeline("QwenImage", vae_of())
    pipe.vae.decoder.conv_out.weight.data.mul_(30)  # so that there is something to clamp
    tokens, own = (run(pipe, kind, 2, **SIZE) for kind in ("latent", "pt"))
    pixels = noise(2, 3, 1, 32, 48)
    with torch.no_grad():
        mode = pipe.vae.encode(pixels).latent_dist.mode()
    handle = fluxvae.install(pipe.vae, kernels="torch", memory_limit="100MB")
    exact = run(pipe, "pt", 2, **SIZE)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        clamped = pipe.vae.decode(noise(1, 16, 1, 4, 6)).sample
    options: dict[str, Any] = {"kernels": "torch"}
    assert torch.equal(exact, Decoder(pipe.vae, **options).decode(tokens, **SIZE, output_type="pt"))
    assert torch.equal(latents[:, :, 0], Encoder(pipe.vae, **options).engine.encode(pixels[:, :, 0])[:, :16])
    assert latents.shape == mode.shape
    assert not torch.equal(exact, own), "another engine computed it"
    assert float((exact - own).abs().max()) < 1e-4
    assert float((latents - mode).abs().max()) < 1e-5
    assert clamped.shape == (1, 3, 1, 32, 48)
    assert float(clamped.abs().max()) == 1.0
    handle.remove()
    assert torch.equal(run(pipe, "pt", 2, **SIZE), own)


def test_a_job_refuses_layers(tmp_path: Path) -> None:
    """Such files hold several pictures a row, so the job names them and goes on with the others."""
    source = tmp_path / "in"
    source.mkdir()
    save_file({"latents": noise(1, 12, 64)}, source / "packed.safetensors")
    save_file({"latents": noise(1, 16, 2, 4, 6)}, source / "unpacked.safetensors")
    save_file({"latents": noise(1, 16, 1, 4, 6)}, source / "one.safetensors")
    job = Job(inputs=(str(source),), out=str(tmp_path / "out"), format="npy", **SIZE)
    report = decode_files(job, decoder=Decoder(vae_of(channels=4), kernels="torch"))
    failed = {Path(failure.source).stem: failure.message for failure in report.failures}
    assert set(failed) == {"packed", "unpacked"}
    assert "got 2 layers of 32x48 in packed latents of shape (1, 12, 64)" in failed["packed"]
    assert "2 layers of each image; a job makes one picture of each row" in failed["unpacked"]
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["one.npy"]


def test_the_format() -> None:
    """Said in words, and read from the class and the config alone."""
    mine = LatentFormat.from_vae(vae_of("Wan"))
    assert (mine.channels, mine.vae_scale_factor, mine.frames, mine.layers) == (16, 8, True, False)
    assert (mine.packed_features, mine.statistics, mine.layers) == (64, True, False)
    assert str(mine) == "latents / (1 / latents_std) + latents_mean"
    assert LatentFormat.from_vae(vae_of(channels=4)).layers
    assert not LatentFormat().frames
