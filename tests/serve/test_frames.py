"""Qwen-Image's and Wan's VAE on the server of every model: frames, layers, pipelines and modular steps.

What all models have in common is in the other tests of this folder, above all in test_family.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.anima.decoders import AnimaVaeDecoderStep
from diffusers.modular_pipelines.anima.encoders import AnimaImg2ImgVaeEncoderStep
from diffusers.modular_pipelines.krea2.decoders import Krea2DecodeStep
from diffusers.modular_pipelines.qwenimage.decoders import QwenImageDecoderStep, QwenImageLayeredDecoderStep
from diffusers.modular_pipelines.qwenimage.encoders import QwenImageVaeEncoderStep
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

import fluxvae.client
from family_models import qwen_image_vae, wan_vae
from fluxvae import Decoder, InvalidImagesError, InvalidLatentsError, InvalidOptionError
from fluxvae.client import Client, RemoteVAE
from fluxvae.diffusers_blocks import LocalVaeStep, RemoteVaeStep
from fluxvae.latents.reading import Reading
from fluxvae.serve.client.decoding import make_decode_request
from fluxvae.serve.model.decoding import Decoding
from fluxvae.serve.model.startup import Settings
from frame_pipelines import pipeline, run
from serve.families import ENCODERS, QWEN_IMAGE, Family
from serve.gateways import Gateways, ask

pytestmark = pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated:FutureWarning")

SIZE = {"height": 32, "width": 48}
"""A grid of 2 x 3 patches, of 4 x 6 latents."""
ENCODER = ENCODERS[2]


@pytest.fixture(scope="module")
def gateway(family: Family) -> Iterator[str]:
    gateways = Gateways(family.server.grpc_url, family.server.metrics_url, family.server.config_key)
    yield gateways.start(models=(QWEN_IMAGE, ENCODER))
    gateways.stop()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def noise(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE.values(), 3), np.uint8))


# -- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(2, 6, 64), (2, 16, 4, 6), (2, 16, 1, 4, 6), (16, 1, 4, 6), (1, 16, 1, 3, 5)],
    ids=["packed", "unpacked", "frame", "frame of one image", "odd frame"],
)
def test_every_shape_of_one_frame(family: Family, gateway: str, shape: tuple[int, ...]) -> None:
    """By our client and by diffusers' own, the library's pixels."""
    latents = noise(*shape)
    size = SIZE if len(shape) == 3 else {}
    expected = family.library[QWEN_IMAGE].decode(latents, output_type="uint8", **size)
    with family.client(QWEN_IMAGE) as client:
        np.testing.assert_array_equal(client.decode(latents, output_type="uint8", **size), expected)
    tensor = {"output_type": "pt", "return_type": "pt", "partial_postprocess": True}
    there = remote_decode(f"{gateway}/decode", latents, **tensor, **size)
    np.testing.assert_array_equal(there.numpy(), expected)
    raw = remote_decode(f"{gateway}/decode", latents, do_scaling=False, **tensor, **size)
    np.testing.assert_array_equal(
        raw.numpy(), family.library[QWEN_IMAGE].decode(latents, raw=True, output_type="uint8", **size)
    )


def test_several_layers_are_refused_with_what_to_do(gateway: str) -> None:
    """Only a checkpoint tells layers from a video, and a request has one picture for each of its rows."""
    query, headers = {"dtype": "float32", "do_scaling": "True"}, {"Content-Type": "tensor/binary"}
    layers = noise(1, 16, 3, 4, 6)
    with pytest.raises(InvalidLatentsError, match=r"3 layers or frames in each row.* latents.movedim"):
        make_decode_request(layers, Reading(), model=QWEN_IMAGE, output_type="uint8")
    asked = f"/decode?{urlencode({**query, 'shape': layers.shape}, doseq=True)}"
    answer = ask(gateway, "POST", asked, headers=headers, body=layers.numpy().tobytes())
    assert answer.status == 400
    assert "as a batch, latents.movedim(2, 1).flatten(0, 1)" in json.loads(answer.body)["error"]
    packed = noise(2, 18, 64)
    asked = f"/decode?{urlencode({**query, **SIZE, 'shape': packed.shape, 'output_type': 'pt'}, doseq=True)}"
    answer = ask(gateway, "POST", asked, headers=headers, body=packed.numpy().tobytes())
    assert answer.status == 400
    assert "3 layers or frames in each row" in json.loads(answer.body)["error"]
    assert "as a batch, latents.reshape(6, 6, 64)" in json.loads(answer.body)["error"]


@pytest.mark.parametrize("channels", [3, 4])
def test_the_model_refuses_layers_too(channels: int) -> None:
    """Its checkpoint may be Layered's, where the library would decode them, or another's."""
    work = Decoding(Decoder(qwen_image_vae(channels=channels, base_dim=8), kernels="torch"), 10**6)
    packed = noise(2, 18, 64).numpy()
    sizes = {name: np.full((2, 1), value, np.int32) for name, value in SIZE.items()}
    message = {3: "2 x 3 = 6 patches .* hold 18", 4: r"3 layers or frames in each row.* latents.reshape\(6, 6, 64\)"}
    with pytest.raises(InvalidLatentsError, match=message[channels]):
        work.read(0, {"latents": packed, **sizes}, "{}", {"images"})
    one = work.read(0, {"latents": packed[:, :6], **sizes}, "{}", {"images"})
    assert one.request.batch == 2


# -- pictures to latents -------------------------------------------------------------------------------------------


def test_encoding(family: Family, gateway: str) -> None:
    """By our client and by diffusers' own: normalised or raw, and there and back."""
    image, library = picture(), family.encoders[ENCODER]
    with family.client(QWEN_IMAGE) as client:
        assert client.encoder_model == ENCODER
        for options in ({}, {"packed": False}, {"raw": True, "packed": False}, {"sample": 5}):
            seed = {"sample": torch.Generator().manual_seed(5)} if "sample" in options else {}
            expected = library.encode(image, **{**options, **seed})
            np.testing.assert_array_equal(client.encode(image, **options), expected.numpy())
        tokens = torch.from_numpy(client.encode(image))
        again = client.decode(tokens, **SIZE, output_type="uint8")
        with pytest.raises(InvalidOptionError, match="scaling_factor: got 0.5; this checkpoint has latents_mean and"):
            client.encode(image, scaling_factor=0.5)
    np.testing.assert_array_equal(again, family.library[QWEN_IMAGE].decode(tokens, **SIZE, output_type="uint8"))
    raw = remote_encode(f"{gateway}/encode", image)
    assert torch.equal(raw, library.encode(image, packed=False, raw=True))
    with pytest.raises(RuntimeError, match="scaling_factor: got '0.5', but Qwen-Image's latents are rescaled"):
        remote_encode(f"{gateway}/encode", image, scaling_factor=0.5)


# -- pipelines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["QwenImage", "QwenImageEditPlus", "QwenImageImg2Img", "Krea2", "Wan"])
def test_a_pipeline_on_the_server(
    family: Family, checkpoints: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images have the bits of the exact engine in this process; so have the latents of its references. The VAE's
    configuration is enough, as it is read from a checkpoint."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (48, 32))
    pipe = pipeline(name, wan_vae() if name == "Wan" else qwen_image_vae())
    options = {**SIZE, **({"image": picture()} if "Edit" in name or "Img2Img" in name else {})}
    if "Img2Img" in name:
        options["strength"] = 1.0
    if name == "Wan":
        options["num_frames"] = 1
    with fluxvae.install(pipe.vae):
        expected = run(pipe, "pt", **options)
    own = run(pipe, "pt", **options)
    with fluxvae.client.install(pipe, family.server.grpc_url) as handle:
        assert (handle.vae.client.model, handle.vae.client.encoder_model) == (QWEN_IMAGE, ENCODER)
        assert torch.equal(run(pipe, "pt", **options), expected)
    assert not torch.equal(own, expected), "the two ways cannot be told apart"
    pipe.vae = RemoteVAE(family.server.grpc_url, type(pipe.vae).load_config(checkpoints[QWEN_IMAGE]))
    assert torch.equal(run(pipe, "pt", **options), expected)


def step_of(step: Any, vae: Any, output: str, **inputs: Any) -> Any:
    pipe = SequentialPipelineBlocks.from_blocks_dict({"step": step}).init_pipeline()
    if vae is not None:
        pipe.update_components(vae=vae)
    pipe.__dict__["transformer"] = None  # Anima's step that encodes looks whether there is one
    return pipe(**copy.deepcopy(inputs), output=output)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (AnimaVaeDecoderStep, {}),
        (QwenImageDecoderStep, {}),
        (Krea2DecodeStep, {"output_type": "pt"}),
        (QwenImageLayeredDecoderStep, {"output_type": "pt"}),
    ],
)
def test_modular_steps_that_decode(family: Family, make: Any, inputs: dict[str, Any]) -> None:
    latents = noise(2, 16, 3 if make is QwenImageLayeredDecoderStep else 1, 4, 6)
    expected = step_of(LocalVaeStep(make()), qwen_image_vae(), "images", latents=latents, **inputs)
    found = step_of(RemoteVaeStep(make(), family.server.grpc_url), None, "images", latents=latents, **inputs)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_modular_steps_that_encode(family: Family) -> None:
    pixels = 2 * torch.from_numpy(np.asarray(picture()) / np.float32(255)).movedim(2, 0)[None] - 1
    for make, inputs in (
        (AnimaImg2ImgVaeEncoderStep, {"image": picture(), **SIZE}),
        (QwenImageVaeEncoderStep, {"processed_image": pixels}),
    ):
        expected = step_of(LocalVaeStep(make()), qwen_image_vae(), "image_latents", **inputs)
        found = step_of(RemoteVaeStep(make(), family.server.grpc_url), None, "image_latents", **inputs)
        assert torch.equal(found, expected)


# -- what is refused before anything is sent -----------------------------------------------------------------------


def test_a_remote_vae_asks_no_model_of_other_latents() -> None:
    """Qwen-Image's raw latents have the shape of FLUX.1's, so that nothing but the model's name tells them apart."""
    config = qwen_image_vae(base_dim=8).config
    vae = RemoteVAE("localhost:1", config)
    assert (vae.client.model, vae.client.encoder_model) == (QWEN_IMAGE, ENCODER)
    assert RemoteVAE("localhost:1", wan_vae(base_dim=8).config).client.model == QWEN_IMAGE
    assert len(vae.temperal_downsample) == 3
    with pytest.raises(InvalidOptionError, match="model: got 'vae_decoder', which serves AutoencoderKL, with the conf"):
        RemoteVAE(Client("localhost:1"), config)
    with pytest.raises(InvalidOptionError, match="model: got 'vae_decoder_qwen_image', .*; expected 'vae_decoder'"):
        RemoteVAE("localhost:1", model=QWEN_IMAGE)
    with pytest.raises(InvalidOptionError, match="encoder_model: got 'vae_encoder', which serves AutoencoderKL, with"):
        RemoteVAE("localhost:1", config, encoder_model="vae_encoder")
    with pytest.raises(InvalidLatentsError, match=r"z: got shape \(1, 16, 4, 6\), expected one frame, \(batch, 16, "):
        vae.decode(noise(1, 16, 4, 6))
    with pytest.raises(InvalidLatentsError, match=r"z: got shape \(1, 16, 3, 4, 6\), expected one frame"):
        vae.decode(noise(1, 16, 3, 4, 6))
    for shape in ((1, 3, 32, 48), (1, 3, 5, 32, 48), (1, 1, 1, 32, 48)):
        with pytest.raises(InvalidImagesError, match=r"expected floats \(batch, 3 or 4, 1, height, width\)"):
            vae.encode(torch.zeros(shape))


def test_a_pipeline_without_its_vae_has_no_statistics() -> None:
    pipe = pipeline("QwenImage", qwen_image_vae(base_dim=8))
    pipe.vae = None
    with pytest.raises(InvalidOptionError, match="QwenImagePipeline with vae=None, .* AutoencoderKLQwenImage; load"):
        fluxvae.client.install(pipe, "localhost:1")


# -- configuration -------------------------------------------------------------------------------------------------


def test_both_classes_may_be_served_and_no_other(family: Family) -> None:
    config = {"vae_class": {"string_value": "AutoencoderKLQwenImage, AutoencoderKLWan"}}
    environ = {"FLUXVAE_QWEN_IMAGE_CHECKPOINT": "q", "FLUXVAE_QWEN_IMAGE_FAMILY": "f", "FLUXVAE_CHECKPOINT": "other"}
    settings = Settings.read(config, environ, kind="CPU", device_id="0")
    assert (settings.checkpoint, settings.family) == ("q", "f")
    for vae in (qwen_image_vae(base_dim=8), wan_vae(base_dim=8)):
        settings.check(Decoder(vae, kernels="torch"))
    assert isinstance(family.library[QWEN_IMAGE].vae, AutoencoderKLQwenImage)
    assert type(family.encoders[ENCODER].vae).__name__ == "AutoencoderKLWan"
