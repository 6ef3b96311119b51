"""FLUX.1, FLUX.2 and a preview on one real server: the library's results, each family's options, and who does what.

Not covered here: the arithmetic (tests of the library), and what all models share (the other tests of this folder).
"""

from __future__ import annotations

import ast
import io
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.ideogram4.decoders import Ideogram4DecodeStep
from diffusers.utils.remote_utils import remote_decode
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

import modular_pipelines
from family_models import flux2_pipeline, flux2_vae, ids_of, run
from fluxvae import InvalidLatentsError, InvalidOptionError
from fluxvae.client import Client, install
from fluxvae.diffusers_blocks import LocalVaeStep, RemoteVaeStep
from fluxvae.errors import FluxVAEError
from fluxvae.latents.format import PREVIEW_NOTE
from fluxvae.serve.model.startup import Settings, make_work
from fluxvae.serve.models import MODELS
from fluxvae.serve.triton.repository import write_repository
from serve.client import PROTOCOLS, Protocol, Request, Serving
from serve.families import ENCODERS, FLUX1, FLUX2, PREVIEW, QWEN_IMAGE, Family
from serve.gateways import Gateways, ask
from serve.supervised import Supervised

pytestmark = [
    pytest.mark.filterwarnings("ignore:decode. approximate preview:UserWarning"),
    pytest.mark.filterwarnings("ignore:`do_scaling` is deprecated:FutureWarning"),
]
SIZE = {"height": 32, "width": 48}
PATCHES = 6
protocols = pytest.mark.parametrize("protocol", PROTOCOLS)


@pytest.fixture(scope="module")
def gateway(family: Family) -> Iterator[str]:
    gateways = Gateways(family.server.grpc_url, family.server.metrics_url, family.server.config_key)
    yield gateways.start(models=tuple(MODELS))
    gateways.stop()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def latents(features: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, PATCHES, features, generator=torch.Generator().manual_seed(seed))


def shuffled(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the tokens of each row into another order. Returns them with their ids, which tell where they belong."""
    ids = ids_of(SIZE["height"] // 16, SIZE["width"] // 16, len(packed))
    orders = [torch.randperm(PATCHES, generator=torch.Generator().manual_seed(7 + row)) for row in range(len(packed))]
    tokens = torch.stack([row[order] for row, order in zip(packed, orders, strict=True)])
    assert not torch.equal(tokens, packed)
    return tokens, torch.stack([row[order] for row, order in zip(ids, orders, strict=True)])


# -- Triton --------------------------------------------------------------------------------------------------------


def test_the_folders_say_what_they_serve() -> None:
    root = Path(__file__).parents[2] / "triton_models"
    assert {folder.name for folder in root.iterdir()} == set(MODELS)
    for name, served in MODELS.items():
        config = (root / name / "config.pbtxt").read_text()
        classes = ", ".join(served.vae_classes)
        assert f'key: "vae_class" value: {{ string_value: "{classes}" }}' in config
        assert ('key: "encodes" value: { string_value: "true" }' in config) == served.encodes
        assert ('key: "approximate" value: { string_value: "true" }' in config) == (name == PREVIEW)


def test_the_folders_hold_the_same_code() -> None:
    """mypy checks only `vae_decoder`'s code. The others differ in the docstring, and have no demo."""

    def code(name: str) -> list[str]:
        tree = ast.parse((Path(__file__).parents[2] / "triton_models" / name / "1" / "model.py").read_text())
        assert ast.get_docstring(tree)
        return [ast.unparse(part) for part in tree.body[1:] if not isinstance(part, ast.If)]

    assert all(code(name) == code(FLUX1) for name in MODELS)
    assert any("TritonPythonModel" in part for part in code(FLUX1))


@protocols
@pytest.mark.parametrize(("model", "features"), [(FLUX1, 64), (FLUX2, 128), (QWEN_IMAGE, 64), (PREVIEW, 128)])
def test_every_model_gives_the_librarys_pixels(family: Family, protocol: Protocol, model: str, features: int) -> None:
    serving = family.serving(model)
    request = Request(latents(features, batch=2).numpy(), **SIZE)
    serving.assert_same_pixels(serving.infer(protocol, request, model)["images"], request)


@protocols
@pytest.mark.parametrize("model", [FLUX2, PREVIEW])
def test_tokens_in_any_order(family: Family, protocol: Protocol, model: str) -> None:
    packed = latents(128, batch=2)
    tokens, ids = shuffled(packed)
    request = Request(tokens.numpy(), **SIZE, inputs={"latent_ids": ids.numpy()})
    serving = family.serving(model)
    images = serving.infer(protocol, request, model)["images"]
    serving.assert_same_pixels(images, Request(packed.numpy(), **SIZE))
    assert not np.array_equal(images, serving.decode(Request(tokens.numpy(), **SIZE))), "the order matters"


def test_with_and_without_ids_at_the_same_time(family: Family) -> None:
    """Each gets its own picture although Triton never puts requests with and without ids into one batch."""
    serving = family.serving(FLUX2)
    with family.client(FLUX2) as client:
        calls = []
        for seed in range(6):
            packed = latents(128, seed=seed)
            tokens, ids = shuffled(packed)
            calls.append((packed, client.decode(packed, **SIZE, output_type="uint8")))
            calls.append((packed, client.decode(tokens, latent_ids=ids, output_type="uint8")))
    for packed, images in calls:
        serving.assert_same_pixels(images, Request(packed.numpy(), **SIZE))


def test_the_name_and_the_files_of_a_preview_say_approximate(family: Family) -> None:
    serving = family.serving(PREVIEW)
    for format in ("png", "jpeg", "webp"):
        request = Request(latents(128).numpy(), **SIZE, outputs=("images_encoded",), parameters={"format": format})
        picture = Image.open(io.BytesIO(serving.infer("grpc", request, PREVIEW)["images_encoded"][0, 0]))
        said = picture.info if format == "png" else json.loads(picture.getexif()[270])
        assert PREVIEW_NOTE in said["Comment"]
    full = Request(latents(128).numpy(), **SIZE, outputs=("images_encoded",))
    answer = family.serving(FLUX2).infer("grpc", full, FLUX2)
    assert "Comment" not in Image.open(io.BytesIO(answer["images_encoded"][0, 0])).info
    assert "vae_preview_0_0 serves" in family.server.log()
    assert PREVIEW_NOTE in family.server.log()


# -- the client ----------------------------------------------------------------------------------------------------

OPTIONS = [
    (FLUX1, 64, {"scaling_factor": 0.5, "shift_factor": 0.25}),
    (FLUX2, 128, {}),
    (FLUX2, 128, {"batch_norm_eps": 0.5}),
    (FLUX2, 128, {"raw": True}),
    (FLUX2, 128, {"raw": False}),
    (FLUX2, 128, {"feature_order": "row_column_channel"}),
    (FLUX2, 128, {"feature_order": "row_column_channel", "raw": True}),
    (QWEN_IMAGE, 64, {}),
    (QWEN_IMAGE, 64, {"raw": True}),
    (PREVIEW, 128, {}),
]


@pytest.mark.parametrize("transport", ["grpc", "http", "shared_memory"])
def test_the_client_does_what_the_library_does(family: Family, transport: str) -> None:
    seen = set()
    for model, features, options in OPTIONS:
        packed = latents(features)
        url = family.server.http_url if transport == "http" else family.server.grpc_url
        with Client(url, model=model, protocol=transport) as client:
            images = client.decode(packed, **SIZE, output_type="pt", **options)
        expected = family.library[model].decode(packed, **SIZE, output_type="pt", **options)
        assert torch.equal(images, expected)
        seen.add(images.numpy().tobytes())
    assert len(seen) == len(OPTIONS) - 1, "all but the default said in words differ"


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 128, 2, 3), {}),
        ((1, 32, 4, 6), {"raw": True}),
        ((1, 32, 4, 6), {"raw": False}),
        ((2, 32, 3, 5), {"raw": True}),
        ((1, 32, 4, 6), {"raw": False, "feature_order": "row_column_channel"}),
        ((1, 128, 2, 3), {"feature_order": "row_column_channel"}),
    ],
    ids=["patches", "raw", "unpatchified", "odd and raw", "Ideogram 4's", "Ideogram 4's patches"],
)
def test_flux2_unpacked(family: Family, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    unpacked = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with family.client(FLUX2) as client:
        images = client.decode(unpacked, output_type="uint8", **options)
    np.testing.assert_array_equal(images, family.library[FLUX2].decode(unpacked, output_type="uint8", **options))


REFUSED: list[tuple[str, int, dict[str, Any], type[Exception], str]] = [
    (FLUX1, 64, {"batch_norm_eps": 1e-5}, InvalidOptionError, "batch_norm_eps: got 1e-05; this checkpoint has scal"),
    (FLUX2, 128, {"scaling_factor": 0.5}, InvalidOptionError, "scaling_factor: got 0.5; this checkpoint has Batch"),
    (FLUX2, 128, {"shift_factor": 0.5}, InvalidOptionError, "shift_factor: got 0.5; this checkpoint has BatchNorm"),
    (FLUX2, 128, {"batch_norm_eps": -1.0}, InvalidOptionError, "batch_norm_eps: got -1.0, expected 0 or more"),
    (PREVIEW, 128, {"scaling_factor": 0.5}, InvalidOptionError, "scaling_factor: got 0.5; a preview "),
    (PREVIEW, 128, {"raw": True}, InvalidOptionError, "raw: got True; a preview"),
    *(
        (QWEN_IMAGE, 64, {name: 0.5}, InvalidOptionError, f"{name}: got 0.5; this checkpoint has latents_mean and lat")
        for name in ("scaling_factor", "shift_factor", "batch_norm_eps")
    ),
    (QWEN_IMAGE, 128, {}, InvalidLatentsError, r"got 128 features per token, which looks like FLUX\.2 .*; expected 64"),
    (FLUX1, 64, {"feature_order": "row_column_channel"}, InvalidOptionError, "feature_order: got .* for a checkpoint"),
    (PREVIEW, 128, {"feature_order": "row_column_channel"}, InvalidOptionError, "feature_order: got .* for a preview"),
    (FLUX2, 128, {"feature_order": "rows"}, InvalidOptionError, "feature_order: got 'rows', expected 'channel_row"),
    (FLUX1, 128, {}, InvalidLatentsError, r"got 128 features per token, which looks like FLUX\.2 .*; expected 64"),
    (FLUX2, 64, {}, InvalidLatentsError, r"got 64 features per token, which looks like FLUX\.1.*; expected 128"),
    (PREVIEW, 64, {}, InvalidLatentsError, r"got 64 features per token, which looks like FLUX\.1.*; expected 128"),
]


@pytest.mark.parametrize(("model", "features", "options", "error", "message"), REFUSED)
def test_what_a_model_has_no_place_for_is_refused(
    family: Family, model: str, features: int, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with family.client(model) as client, pytest.raises(error, match=message) as refused:
        client.decode(latents(features), **SIZE, **options)
    assert type(refused.value) is error


def test_ids_that_are_wrong(family: Family) -> None:
    serving, ids = family.serving(FLUX2), ids_of(2, 3, 1)
    twice = ids.clone()
    twice[0, 1] = ids[0, 0]
    packed = latents(128).numpy()
    for protocol in PROTOCOLS:
        with pytest.raises(Exception, match="latent_ids: got row 0, column 0 for 2 tokens"):
            serving.infer(protocol, Request(packed, **SIZE, inputs={"latent_ids": twice.numpy()}), FLUX2)
    with family.client(FLUX1) as client, pytest.raises(InvalidLatentsError, match="latent_ids"):
        client.decode(latents(64), latent_ids=ids)  # the model has no such input


def test_a_flux2_pipeline_decodes_on_the_server(family: Family, checkpoints: dict[str, str]) -> None:
    vae = flux2_vae()
    pipe = flux2_pipeline(vae)
    here = run(pipe, 32, 48, 1, "np")
    with install(pipe, family.server.grpc_url):
        assert pipe.vae is not vae
        there = run(pipe, 32, 48, 1, "np")
    assert pipe.vae is vae
    np.testing.assert_allclose(there, here, rtol=0, atol=2e-5)
    pipe.vae = None
    with pytest.raises(InvalidOptionError, match="Flux2Pipeline with vae=None, .* AutoencoderKLFlux2"):
        install(pipe, family.server.grpc_url)


# -- the gateway ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family_name", modular_pipelines.FAMILIES)
def test_a_modular_pipeline_without_a_vae_decodes_and_encodes_on_the_server(family: Family, family_name: str) -> None:
    """Its images, and the latents of its references, have the bits of the exact engine in this process."""
    name, vae = family_name, modular_pipelines.vae_of(family_name)
    blocks = modular_pipelines.blocks_of(name)
    here = modular_pipelines.pipeline(name, LocalVaeStep.replace_all(blocks), vae)
    remote = RemoteVaeStep.replace_all(blocks, family.server.grpc_url)
    there = modular_pipelines.pipeline(name, remote, vae, with_vae=False)
    assert "vae" not in there.components
    own = modular_pipelines.pipeline(name, blocks, vae)
    for options in (
        {"height": 48, "width": 80, "num_images_per_prompt": 2},
        {"image": modular_pipelines.picture(), **({"height": 48, "width": 80} if name in ("Flux", "ZImage") else {})},
    ):
        mine, expected, theirs = (
            modular_pipelines.run(pipe, name, output_type="pt", **options) for pipe in (there, here, own)
        )
        assert torch.equal(mine, expected)
        assert not torch.equal(theirs, expected), "the two ways cannot be told apart"


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_remote_step_has_the_pipelines_dtype_or_another(family: Family, dtype: str) -> None:
    """What it encodes comes in the dtype that its transformer takes, whatever the server's VAE computes in."""
    vae = modular_pipelines.vae_of("Flux2")
    blocks = RemoteVaeStep.replace_all(modular_pipelines.blocks_of("Flux2"), family.server.grpc_url, dtype=dtype)
    pipe = modular_pipelines.pipeline("Flux2", blocks.sub_blocks["vae_encoder"], vae, with_vae=False)
    pipe.update_components(transformer=None)
    [latents] = pipe(image=modular_pipelines.picture(), output="image_latents")
    assert latents.dtype == (torch.float32 if dtype == "auto" else torch.float16)
    bfloat16 = modular_pipelines.pipeline("Flux2", blocks, vae, with_vae=False, dtype=torch.bfloat16)
    if dtype == "auto":
        image = modular_pipelines.run(bfloat16, "Flux2", image=modular_pipelines.picture(), output_type="pt")
        assert image.dtype == torch.bfloat16


def test_ideogram_4s_step_decodes_on_the_server(family: Family) -> None:
    """The server has the statistics, and is told the order of the features."""
    step, vae = Ideogram4DecodeStep(), flux2_vae()
    inputs = {"latents": torch.randn(2, 32, 4, 6, generator=torch.Generator().manual_seed(3)), "output_type": "pt"}
    here = LocalVaeStep(step).init_pipeline()
    here.update_components(vae=vae)
    there = RemoteVaeStep(step, family.server.grpc_url).init_pipeline()
    assert torch.equal(there(**inputs, output="images"), here(**inputs, output="images"))


def test_a_remote_step_does_not_draw_from_flux2s_latents(family: Family) -> None:
    """The server sends the mode alone; no pipeline of diffusers draws."""
    step = RemoteVaeStep(modular_pipelines.blocks_of("Flux2").sub_blocks["decode"], family.server.grpc_url)
    vae = step.vae_for(SimpleNamespace(_execution_device=torch.device("cpu"), dtype=torch.float32))
    distribution = vae.encode(torch.zeros(1, 3, 32, 48)).latent_dist
    assert distribution.mode().shape == (1, 32, 4, 6)
    with pytest.raises(InvalidOptionError, match="sample: got a step that draws"):
        distribution.sample()
    step.close(vae)


def remote(gateway: str, model: str | None, packed: torch.Tensor, **options: Any) -> Any:
    name, _, query = (model or "").partition("?")
    path = "/" if model is None else f"/models/{name}/decode" + (f"?{query}" if query else "")
    fixed = {"output_type": "pt", "return_type": "pt", "partial_postprocess": True}
    return remote_decode(f"{gateway}{path}", packed, **{**SIZE, **fixed, **options})


@pytest.mark.parametrize(
    ("model", "features", "factors"),
    [
        (None, 64, {"scaling_factor": 0.5, "shift_factor": 0.25}),
        (FLUX1, 64, {}),
        (FLUX2, 128, {}),
        (QWEN_IMAGE, 64, {}),
        (PREVIEW, 128, {}),
    ],
)
def test_diffusers_own_client(
    family: Family, gateway: str, model: str | None, features: int, factors: dict[str, float]
) -> None:
    packed = latents(features, batch=2)
    images = remote(gateway, model, packed, **factors)
    expected = family.library[model or FLUX1].decode(packed, **SIZE, output_type="uint8", **factors)
    np.testing.assert_array_equal(images.numpy(), expected)


def test_raw_latents_and_patches_of_flux2(family: Family, gateway: str) -> None:
    library = family.library[FLUX2]
    for shape, raw in (((1, 32, 3, 5), True), ((1, 32, 4, 6), False), ((1, 128, 2, 3), False)):
        unpacked = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        images = remote(gateway, FLUX2, unpacked, height=None, width=None, do_scaling=not raw)
        np.testing.assert_array_equal(images.numpy(), library.decode(unpacked, raw=raw, output_type="uint8"))


def test_ideogram_4_by_diffusers_own_client(family: Family, gateway: str) -> None:
    """What the client has no parameter for stands in the address."""
    model = f"{FLUX2}?feature_order=row_column_channel"
    packed = latents(128, batch=2)
    images = remote(gateway, model, packed)
    expected = family.library[FLUX2].decode(packed, **SIZE, output_type="uint8", feature_order="row_column_channel")
    np.testing.assert_array_equal(images.numpy(), expected)
    unpatchified = torch.randn(1, 32, 4, 6, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="feature_order: got 'row_column_channel' with raw=True"):
        remote(gateway, model, unpatchified, height=None, width=None, do_scaling=False)


WRONG = [
    (None, 128, {}, r"128 features .* looks like FLUX\.2 .*decodes such latents at /models/vae_decoder_flux2/decode"),
    (
        FLUX2,
        64,
        {},
        r"64 features .* looks like FLUX\.1 .*decodes such latents at /models/vae_decoder/decode or "
        "/models/vae_decoder_qwen_image/decode, by the model that made them",
    ),
    (QWEN_IMAGE, 128, {}, r"128 features .* decodes such latents at /models/vae_decoder_flux2/decode"),
    (
        QWEN_IMAGE,
        64,
        {"scaling_factor": 0.5},
        "scaling_factor: got '0.5', but Qwen-Image's latents are rescaled",
    ),
    (QWEN_IMAGE, 64, {"shift_factor": 0.5}, "shift_factor: got '0.5', but Qwen-Image's latents are rescaled"),
    (PREVIEW, 64, {}, r"64 features per token, which looks like FLUX\.1 "),
    (FLUX2, 128, {"scaling_factor": 0.5}, "scaling_factor: got '0.5', but FLUX.2's latents are rescaled by"),
    (PREVIEW, 128, {"shift_factor": 0.5}, "shift_factor: got '0.5', but a preview takes latents as the transformer"),
    (f"{FLUX2}?feature_order=rows", 128, {}, "feature_order: got 'rows', expected one of channel_row_column, row_"),
    (f"{FLUX1}?feature_order=row_column_channel", 64, {}, "feature_order: got .* for a checkpoint that is not Auto"),
    (f"{PREVIEW}?feature_order=row_column_channel", 128, {}, "feature_order: got .* for a preview"),
    (PREVIEW, 128, {"do_scaling": False}, "do_scaling: got .*, which means raw latents, but a preview"),
]


@pytest.mark.parametrize(("model", "features", "options", "message"), WRONG)
def test_refused_by_the_gateway(
    gateway: str, model: str | None, features: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        remote(gateway, model, latents(features), **options)


def test_a_preview_is_called_one_by_its_answer(gateway: str) -> None:
    query = "shape=1&shape=6&shape=128&dtype=float32&height=32&width=48&do_scaling=True&image_format=png"
    for model, note in ((PREVIEW, PREVIEW_NOTE), (FLUX2, None)):
        headers = {"Content-Type": "tensor/binary"}
        body = latents(128).numpy().tobytes()
        answer = ask(gateway, "POST", f"/models/{model}/decode?{query}", headers=headers, body=body)
        assert answer.status == 200, answer.body
        assert answer.headers.get("x-fluxvae-warning") == note
        assert Image.open(io.BytesIO(answer.body)).info.get("Comment") == note


def test_the_first_model_that_encodes_has_the_short_path(gateway: str, family: Family) -> None:
    images = np.random.default_rng(2).integers(0, 256, (1, *SIZE.values(), 3), np.uint8)
    query = urlencode({"shape": images.shape, "dtype": "uint8"}, doseq=True)
    answer = ask(gateway, "POST", f"/encode?{query}", body=images.tobytes())
    expected = family.encoders[ENCODERS[0]].encode(images, packed=False, raw=True)
    assert answer.body == expected.numpy().tobytes()


def test_what_the_gateway_says_of_itself(gateway: str) -> None:
    assert ask(gateway, path="/readyz").status == 200
    facts = json.loads(ask(gateway, path="/info").body)
    assert facts["model"] == FLUX1
    assert {name: (of["path"], of["approximate"]) for name, of in facts["models"].items()} == {
        name: (f"/models/{name}/{'encode' if name in ENCODERS else 'decode'}", name == PREVIEW) for name in MODELS
    }
    assert {name: of["encodes"] for name, of in facts["models"].items()} == {name: name in ENCODERS for name in MODELS}
    paths = json.loads(ask(gateway, path="/openapi.json").body)["paths"]
    assert {of["path"] for of in facts["models"].values()} | {"/decode", "/encode"} <= paths.keys()
    assert "approximate preview" in paths[f"/models/{PREVIEW}/decode"]["post"]["summary"]
    assert ask(gateway, path="/docs").status == 200
    metrics = ask(gateway, path="/metrics").body.decode()
    for name in MODELS:
        assert f'fluxvae_{"en" if name in ENCODERS else "de"}codes_total{{model="{name}"}}' in metrics
    assert ask(gateway, "POST", "/models/other/decode").status == 404


def test_not_ready_while_one_of_them_is_not_there(family: Family) -> None:
    gateways = Gateways(family.server.grpc_url, family.server.metrics_url, family.server.config_key)
    try:
        answer = ask(gateways.start(models=(FLUX2, "absent")), path="/readyz")
    finally:
        gateways.stop()
    assert answer.status == 503
    assert json.loads(answer.body)["reason"].startswith("absent: ")


def test_an_encoder_gives_the_librarys_latents(family: Family) -> None:
    """FLUX.2's in patches and normalised, or raw; with latents that the decoder beside it takes back."""
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE.values(), 3), np.uint8)
    for name in ENCODERS:
        library = family.encoders[name]
        expected = {
            "latents": library.encode(images),
            "latents_unpacked": library.encode(images, packed=False),
        }
        for asked, parameters in (
            (expected, {}),
            ({"latents_unpacked": library.encode(images, packed=False, raw=True)}, {"raw": True}),
        ):
            request = Request(images, **SIZE, outputs=tuple(asked), parameters=parameters)
            made = family.infer_pictures(request, name)
            for output, latents_of in asked.items():
                np.testing.assert_array_equal(made[output], latents_of.numpy())
    tokens = torch.from_numpy(
        family.infer_pictures(Request(images, **SIZE, outputs=("latents",)), ENCODERS[1])["latents"]
    )
    request = Request(tokens.numpy(), **SIZE)
    serving = family.serving(FLUX2)
    serving.assert_same_pixels(serving.infer("grpc", request, FLUX2)["images"], request)


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_odd_grids_of_flux2_are_for_raw_latents(family: Family, size: tuple[int, int]) -> None:
    name = ENCODERS[1]
    images = np.random.default_rng(1).integers(0, 256, (1, *size, 3), np.uint8)
    odd = Request(images, *size, outputs=("latents_unpacked",))
    with pytest.raises(InferenceServerException, match="expected multiples of 16"):
        family.infer_pictures(odd, name)
    made = family.infer_pictures(replace(odd, parameters={"raw": True}), name)["latents_unpacked"]
    np.testing.assert_array_equal(made, family.encoders[name].encode(images, packed=False, raw=True).numpy())


# -- what keeps a model from loading -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "served", "extra", "message"),
    [
        (FLUX1, FLUX2, {}, "is AutoencoderKLFlux2, expected AutoencoderKL for this model; serve it as vae_decoder_fl"),
        (FLUX2, None, {}, "checkpoint: none is set, and none for AutoencoderKLFlux2 ships; set the parameter checkpo"),
        (
            QWEN_IMAGE,
            FLUX1,
            {},
            "is AutoencoderKL, expected AutoencoderKLQwenImage or AutoencoderKLWan for this model",
        ),
        (
            FLUX1,
            ENCODERS[2],
            {},
            "is AutoencoderKLWan, expected AutoencoderKL for this model; serve it as vae_dec",
        ),
        (
            QWEN_IMAGE,
            None,
            {},
            "none is set, and none for AutoencoderKLQwenImage ships; set the parameter checkpoi",
        ),
        (PREVIEW, PREVIEW, {"approximate": "false"}, "pictures are approximate; set the parameter approximate to tr"),
    ],
)
def test_models_that_do_not_load(
    checkpoints: dict[str, str], tmp_path: Path, model: str, served: str | None, extra: dict[str, str], message: str
) -> None:
    """By the config that Triton would read. That such an error ends Triton is shown in test_server_refusals.py."""
    settings = {**({} if served is None else {"checkpoint": checkpoints[served]}), **extra}
    repository = write_repository(tmp_path / "models", {model: settings}, device="cpu")
    config = text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())
    parameters = {name: {"string_value": value.string_value} for name, value in config.parameters.items()}
    with pytest.raises(FluxVAEError, match=re.escape(message)):
        make_work(Settings.read(parameters, {}, kind="CPU", device_id="0"))


# -- fluxvae serve -------------------------------------------------------------------------------------------------


def test_fluxvae_serve_with_three_models(checkpoints: dict[str, str], family: Family) -> None:
    arguments = ["--model", f"{FLUX2}={checkpoints[FLUX2]}", "--memory-limit", "400MB"]
    arguments += ["--model", f"{ENCODERS[0]}={checkpoints[FLUX1]}", "--model-memory-limit", f"{ENCODERS[0]}=50MB"]
    arguments += ["--model-memory-limit", f"{FLUX2}=250MB"]
    supervised = Supervised.start(checkpoints[FLUX1], arguments, {})
    try:
        supervised.ready()
        where = SimpleNamespace(grpc_url=supervised.address("Triton gRPC"))
        for model, features in ((FLUX1, 64), (FLUX2, 128)):
            assert f"serving {checkpoints[model]} as {model}" in supervised.output
            request = Request(latents(features).numpy(), **SIZE)
            serving = Serving(where, family.library[model])  # type: ignore[arg-type]
            serving.assert_same_pixels(serving.infer("grpc", request, model)["images"], request)
        gateway = f"http://{supervised.address('gateway')}"
        facts = json.loads(ask(gateway, path="/info").body)["models"]
        assert {name: of["settings"]["memory_limit"] for name, of in facts.items()} == {
            FLUX1: "100000000",
            FLUX2: "250MB",
            ENCODERS[0]: "50MB",
        }
        expected = family.library[FLUX2].decode(latents(128), **SIZE, output_type="uint8")
        np.testing.assert_array_equal(remote(gateway, FLUX2, latents(128)).numpy(), expected)
        images = np.random.default_rng(0).integers(0, 256, (1, *SIZE.values(), 3), np.uint8)
        sent = {"images": images, "latents": None, "height": None, "width": None}
        asked = Request(images, **SIZE, outputs=("latents",), inputs=sent)
        made = Serving(where, family.library[FLUX1]).infer("grpc", asked, ENCODERS[0])  # type: ignore[arg-type]
        np.testing.assert_array_equal(made["latents"], family.encoders[ENCODERS[0]].encode(images).numpy())
        assert supervised.signal_and_wait(signal.SIGTERM) == 0, supervised.output
        supervised.assert_nothing_left()
    finally:
        supervised.end()
