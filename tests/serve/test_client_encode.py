"""`fluxvae.client` encodes: the library's latents over every transport, its errors, and pipelines with a remote VAE.

Not covered here: retries and addresses, which decoding and encoding share (test_client.py), and TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline
from PIL import Image

import fluxvae
import fluxvae.client
from documents import ROOT, blocks
from documents import run as run_document
from family_models import flux2_pipeline, flux2_vae, ids_of, run
from fluxvae import Decoder, Encoder, InvalidImagesError, InvalidOptionError, MemoryLimitError
from fluxvae.client import AsyncClient, Client, RemoteVAE
from fluxvae.errors import DeadlineExceededError
from fluxvae.serve.triton.server import TritonServer
from models import flux_pipeline, random_vae
from serve.client import Serving
from serve.families import Family
from serve.test_client import PROTOCOLS, protocols, url_of
from serve.test_server_behaviour import metric
from serve.waiting import wait_for

HEAVY = ("torch", "diffusers", "transformers", "numba", "scipy", "pandas")
FLUX2 = "vae_encoder_flux2"


@pytest.fixture
def client(serving: Serving, protocol: str) -> Iterator[Client]:
    with Client(url_of(serving, protocol), protocol=protocol) as client:
        yield client


def pixels(height: int, width: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(height, width, seed=seed)[0]).convert(mode)


def floats(height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor (B, 3, H, W) in [0, 1], with both ends in it."""
    values = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    values[..., 0, 0], values[..., 0, 1] = 0.0, 1.0
    return values.to(dtype)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.movedim(1, 3).contiguous().numpy()


def assert_same(mine: Any, expected: torch.Tensor, images: Any) -> None:
    """The same bits, and what fits the images: a tensor for a tensor, otherwise an array. It can be written to."""
    assert isinstance(mine, torch.Tensor if isinstance(images, torch.Tensor) else np.ndarray)
    found = torch.as_tensor(mine)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    mine += 1


# Packed latents of a 3x5 grid. None of the pictures would do if rows and columns, or channels, were exchanged.
SIZE = (48, 80)
IMAGES: dict[str, Callable[[], Any]] = {
    "PIL": lambda: picture(*SIZE),
    "PIL in grey": lambda: picture(*SIZE, mode="L"),
    "PIL in black and white": lambda: picture(*SIZE, mode="1"),
    "PIL with a palette": lambda: picture(*SIZE, mode="P"),
    "PIL, opaque": lambda: picture(*SIZE, mode="RGBA"),
    "a list of PIL": lambda: [picture(*SIZE, seed=seed) for seed in range(3)],
    "uint8": lambda: pixels(*SIZE, batch=2),
    "uint8, one": lambda: pixels(*SIZE)[0],
    "uint8, a view": lambda: pixels(SIZE[1], SIZE[0] * 2, batch=2).swapaxes(1, 2)[:, ::2],
    "float16 array": lambda: as_array(floats(*SIZE, batch=2)).astype(np.float16),
    "float32 array": lambda: as_array(floats(*SIZE, batch=2)),
    "float64 array": lambda: as_array(floats(*SIZE)).astype(np.float64)[0] / 3,
    "float16": lambda: floats(*SIZE, batch=2, dtype=torch.float16),
    "bfloat16": lambda: floats(*SIZE, batch=2, dtype=torch.bfloat16),
    "float32": lambda: floats(*SIZE, batch=3),
    "float32, one": lambda: floats(*SIZE)[0],
    "float32, a view": lambda: floats(SIZE[1], SIZE[0]).mT,
}


@protocols
@pytest.mark.parametrize("kind", IMAGES)
def test_whatever_images_come_as(client: Client, encoder: Encoder, kind: str) -> None:
    images = IMAGES[kind]()
    assert_same(client.encode(images), encoder.encode(images), images)
    assert_same(client.encode(images, packed=False), encoder.encode(images, packed=False), images)


@protocols
def test_odd_grids(client: Client, encoder: Encoder) -> None:
    """Latents that are not packed may have odd rows and columns: the size is a multiple of 8."""
    images = pixels(40, 56, batch=2)
    mine = client.encode(images, packed=False)
    assert mine.shape == (2, 16, 5, 7)
    assert_same(mine, encoder.encode(images, packed=False), images)


@protocols
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize(
    "options",
    [
        {"raw": True},
        {"scaling_factor": 0.5},
        {"scaling_factor": 2, "shift_factor": -0.25},
        {"sample": 0},
        {"sample": 2**63 - 1, "raw": True},
        {"sample": np.int64(7), "shift_factor": 0.5, "priority": 1},
    ],
    ids=str,
)
def test_options(client: Client, encoder: Encoder, packed: bool, options: dict[str, Any]) -> None:
    images = pixels(*SIZE, batch=2)
    said = {name: value for name, value in options.items() if name not in ("priority", "sample")}
    if "sample" in options:  # one generator draws for the whole batch
        said["sample"] = torch.Generator().manual_seed(int(options["sample"]))
    assert_same(client.encode(images, packed=packed, **options), encoder.encode(images, packed=packed, **said), images)


@protocols
def test_samples_differ(client: Client) -> None:
    images = pixels(*SIZE)
    mode, first, again, second = (client.encode(images, sample=sample) for sample in (None, 1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, mode)


@protocols
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize(
    "images",
    [
        picture(60, 91),
        picture(60, 91, mode="L"),
        picture(60, 91, mode="P"),
        [picture(33, 40, seed=seed) for seed in range(2)],
        pixels(60, 91, batch=2),
        as_array(floats(60, 91)).astype(np.float16),
        as_array(floats(175, 62)),
        pixels(150, 212)[0],
        floats(60, 91, batch=2, dtype=torch.bfloat16),
        floats(*SIZE),
    ],
    ids=["PIL", "grey", "palette", "list", "uint8", "float16 array", "float32 array", "large", "tensor", "as it is"],
)
def test_resize(client: Client, encoder: Encoder, packed: bool, images: Any) -> None:
    expected = encoder.encode(images, packed=packed, resize=True)
    assert_same(client.encode(images, packed=packed, resize=True), expected, images)


def test_arrays_lose_the_pixels_that_tensors_lose() -> None:
    """Arrays are resized without PyTorch, so here its choice of pixels is compared at every size."""
    from fluxvae.serve.client.encoding import make_encode_request

    for axis in (1, 2):
        for size in range(16, 700):
            shape = [1, 16, 16, 3]
            shape[axis] = size
            ramp = np.linspace(0, 1, size, dtype=np.float32).reshape(-1, *[1] * (3 - axis))
            array = np.ascontiguousarray(np.broadcast_to(ramp, shape))
            fitting = [n // 16 * 16 for n in shape[1:3]]
            expected = torch.nn.functional.interpolate(torch.from_numpy(array).permute(0, 3, 1, 2), size=fitting)
            request = make_encode_request(array, model="vae_encoder", resize=True)
            assert np.array_equal(request.inputs["images_raw"], (2 * expected - 1).numpy()), (axis, size)


@protocols
def test_there_and_back_with_one_client(client: Client, encoder: Encoder, library: Decoder) -> None:
    height, width = SIZE
    latents = client.encode(picture(*SIZE))
    image = client.decode(latents, height=height, width=width, output_type="uint8")
    expected = library.decode(encoder.encode(picture(*SIZE)), height=height, width=width, output_type="uint8")
    assert np.array_equal(image, expected)


@protocols
def test_a_client_of_the_encoder_alone(serving: Serving, encoder: Encoder, protocol: str) -> None:
    with Client(url_of(serving, protocol), protocol=protocol, model="vae_encoder") as client:
        assert_same(client.encode(picture(*SIZE)), encoder.encode(picture(*SIZE)), None)
        with pytest.raises(InvalidOptionError, match="model: got 'vae_encoder', which encodes"):
            client.decode(np.zeros((1, 1, 64), np.float32), height=16, width=16)


@protocols
def test_async(serving: Serving, encoder: Encoder, protocol: str) -> None:
    async def main() -> list[np.ndarray]:
        async with AsyncClient(url_of(serving, protocol), protocol=protocol) as client:
            found = await asyncio.gather(*(client.encode(pixels(*SIZE, seed=seed)) for seed in range(6)))
            with pytest.raises(InvalidImagesError, match="images: got 33x48"):
                await client.encode(pixels(33, 48))
            with pytest.raises(InvalidOptionError, match="batch_norm_eps: got"):
                await client.encode(pixels(*SIZE), batch_norm_eps=1e-4)
            return list(found)

    for seed, mine in enumerate(asyncio.run(main())):
        assert_same(mine, encoder.encode(pixels(*SIZE, seed=seed)), None)


# -- what is refused -------------------------------------------------------------------------------------------------


TRANSPARENT = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
"""Whether it can be encoded, only the server knows: some VAEs have a channel for alpha."""


@protocols
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scaling_factor": 0}, InvalidOptionError, "scaling_factor: got 0"),
        ({"batch_norm_eps": 1e-4}, InvalidOptionError, "batch_norm_eps: got .*scaling_factor instead"),
        ({"raw": True, "shift_factor": 1.0}, InvalidOptionError, "shift_factor: got .* with raw=True"),
        ({"images": pixels(16, 16, batch=9)}, InvalidImagesError, "batch-size must be <= 8"),
        ({"images": pixels(4112, 4096)}, InvalidImagesError, "images: .*more than the 16777216 this server allows"),
        ({"images": TRANSPARENT}, InvalidImagesError, r"expected \(batch, height, width, 3\); if the fourth is alpha"),
    ],
    ids=["scale 0", "eps", "raw and a factor", "9 rows", "too large", "transparent"],
)
def test_errors_are_the_librarys(client: Client, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"images": pixels(32, 32), **options}
    with pytest.raises(kind, match=message):
        client.encode(**given)
    assert client.encode(pixels(32, 32)).shape == (1, 4, 64)


@protocols
def test_a_server_without_the_model(serving: Serving, protocol: str) -> None:
    options = {"protocol": protocol, "encoder_model": FLUX2}
    with (
        Client(url_of(serving, protocol), **options) as client,
        pytest.raises(InvalidOptionError, match=f"model: got '{FLUX2}'.*fluxvae serve --model {FLUX2}="),
    ):
        client.encode(pixels(16, 16))


@pytest.mark.parametrize(
    ("images", "options", "kind", "message"),
    [
        (pixels(40, 56), {}, InvalidImagesError, "images: got 40x56 .*multiples of 16.*32x48.*48x64.*resize=True"),
        (pixels(20, 56), {"packed": False}, InvalidImagesError, "images: got 20x56 .*multiples of 8"),
        (pixels(8, 56), {"resize": True}, InvalidImagesError, "images: got 8x56 .*multiples of 16"),
        (picture(32, 32, mode="CMYK"), {}, InvalidImagesError, "images: got mode CMYK for picture 0"),
        ([picture(32, 32), picture(32, 48)], {}, InvalidImagesError, "images: got 32x32 .*32x48 .*picture 1"),
        ([], {}, InvalidImagesError, "images: got an empty list"),
        ([pixels(16, 16)[0]], {}, InvalidImagesError, "images: got ndarray for picture 0"),
        ("picture.png", {}, InvalidImagesError, "images: got str"),
        (pixels(32, 32).astype(np.int64), {}, InvalidImagesError, "images: got a array of int64"),
        (pixels(32, 32)[..., :1], {}, InvalidImagesError, "images: got a array of shape"),
        (floats(32, 32) * 2 - 1, {}, InvalidImagesError, "images: got values from -1 to 1, .*floats in"),
        (as_array(floats(32, 32)) * 255, {}, InvalidImagesError, "images: got values from 0 to 255"),
        (floats(32, 32) * torch.nan, {}, InvalidImagesError, "images: got values from nan"),
        (as_array(floats(20, 20)).astype(np.float64), {"resize": True}, InvalidImagesError, "images: got .* float64"),
        (pixels(32, 32), {"packed": 1}, InvalidOptionError, "packed: got 1"),
        (pixels(32, 32), {"raw": None}, InvalidOptionError, "raw: got None"),
        (pixels(32, 32), {"resize": "yes"}, InvalidOptionError, "resize: got 'yes'"),
        (pixels(32, 32), {"shift_factor": "0.1"}, InvalidOptionError, "shift_factor: got '0.1'"),
        (pixels(32, 32), {"scaling_factor": float("inf")}, InvalidOptionError, "scaling_factor: got inf"),
        (pixels(32, 32), {"sample": True}, InvalidOptionError, "sample: got True, expected a seed"),
        (pixels(32, 32), {"sample": -1}, InvalidOptionError, "sample: got -1"),
        (pixels(32, 32), {"sample": 2**63}, InvalidOptionError, "sample: got 9223372036854775808"),
        (pixels(32, 32), {"sample": 1.0}, InvalidOptionError, "sample: got 1.0"),
        (pixels(32, 32), {"sample": torch.Generator()}, InvalidOptionError, "sample: got Generator.*cannot be sent"),
        (pixels(32, 32), {"priority": 0}, InvalidOptionError, "priority: got 0"),
    ],
)
def test_refused_before_it_is_sent(images: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    """Nothing listens at the address, so what is not refused here ends in an UnavailableError."""
    with Client("127.0.0.1:1", retries=0) as client, pytest.raises(kind, match=message):
        client.encode(images, **options)


def test_which_model_encodes() -> None:
    for model, encoder in (
        ("vae_decoder", "vae_encoder"),
        ("vae_encoder", "vae_encoder"),
        ("vae_decoder_flux2", FLUX2),
        (FLUX2, FLUX2),
    ):
        with Client("127.0.0.1:1", model=model) as client:
            assert client.encoder_model == encoder
    for model in ("vae_preview", "another"):
        with (
            Client("127.0.0.1:1", model=model) as client,
            pytest.raises(InvalidOptionError, match=r"encoder_model: got None.*Client\(url, encoder_model="),
        ):
            client.encode(pixels(16, 16))
    with pytest.raises(InvalidOptionError, match="encoder_model: got 'vae_decoder_flux2'.*'vae_encoder_flux2'"):
        Client("127.0.0.1:1", encoder_model="vae_decoder_flux2")
    with pytest.raises(InvalidOptionError, match="encoder_model: got 'vae_preview'"):
        Client("127.0.0.1:1", encoder_model="vae_preview")
    with Client("127.0.0.1:1", encoder_model="mine") as client, pickle.loads(pickle.dumps(client)) as copy:
        assert copy.encoder_model == "mine"


@pytest.mark.parametrize("protocol", ["grpc", "shared_memory"])
@pytest.mark.parametrize("how", ["deadline", "cancelled task"])
def test_an_encode_nobody_waits_for_stops(serving: Serving, protocol: str, how: str) -> None:
    images = pixels(2048, 2048)

    def cancellations() -> float:
        return metric(serving.server, "fluxvae_errors_total", model="vae_encoder", kind="DecodeCancelled")

    def in_flight() -> float:
        return metric(serving.server, "fluxvae_in_flight", model="vae_encoder")

    before = cancellations()
    if how == "deadline":
        with (
            Client(serving.server.grpc_url, protocol=protocol) as client,
            pytest.raises(DeadlineExceededError, match="timeout_s: no answer within 0.7 s"),
        ):
            client.encode(images, timeout_s=0.7)
    else:

        async def main() -> None:
            async with AsyncClient(serving.server.grpc_url, protocol=protocol) as client:
                task = asyncio.create_task(client.encode(images))
                await asyncio.to_thread(wait_for, lambda: in_flight() > 0, "the encode to begin")
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert task.cancelled()

        asyncio.run(main())
    wait_for(lambda: cancellations() == before + 1 and in_flight() == 0, "the encode to stop", 5.0)


def test_http_gives_up_at_the_deadline(serving: Serving) -> None:
    with (
        Client(serving.server.http_url, protocol="http") as client,
        pytest.raises(DeadlineExceededError, match="timeout_s: no answer within 0.3 s"),
    ):
        client.encode(pixels(2048, 1024), timeout_s=0.3)


def test_pictures_and_arrays_need_no_pytorch(serving: Serving, encoder: Encoder, tmp_path: Path) -> None:
    """Not even for floats, samples, and sizes that are made to fit."""
    image, file = pixels(60, 91), tmp_path / "picture.png"
    Image.fromarray(image[0]).save(file)
    urls = {protocol: url_of(serving, protocol) for protocol in PROTOCOLS}
    code = f"""
import sys
import numpy as np
from PIL import Image
from fluxvae.client import Client
picture = Image.open({str(file)!r})
array = np.asarray(picture)
for protocol, url in {urls!r}.items():
    with Client(url, protocol=protocol) as client:
        found = [
            client.encode(picture, resize=True),
            client.encode(array, resize=True, sample=3, packed=False),
            client.encode(array.astype(np.float32)[:48, :80] / 255),
        ]
        np.savez({str(tmp_path)!r} + f"/{{protocol}}.npz", *found)
print([name for name in {HEAVY} if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "[]"
    expected = [
        encoder.encode(Image.open(file), resize=True),
        encoder.encode(image[0], resize=True, sample=torch.Generator().manual_seed(3), packed=False),
        encoder.encode(image[0].astype(np.float32)[:48, :80] / 255),
    ]
    for protocol in PROTOCOLS:
        with np.load(tmp_path / f"{protocol}.npz") as found:
            for mine, one in zip(found.values(), expected, strict=True):
                assert_same(mine, one, None)


def test_the_documents_examples(
    serving: Serving, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(60, 91)
    image.save(tmp_path / "photograph.png")
    written = [one for one in blocks(ROOT / "docs" / "clients.md", "python") if "localhost:8001" in one]
    examples = [one for one in written if "photograph.png" in one]
    assert len(examples) == 2
    for example in examples:
        names = run_document(example.replace("localhost:8001", serving.server.grpc_url), tmp_path, monkeypatch)
        assert_same(names["latents"].copy(), encoder.encode(image, resize=True), image)


# -- FLUX.2, and a memory limit --------------------------------------------------------------------------------------


@pytest.fixture
def others(family: Family) -> TritonServer:
    """The server of FLUX.2's models, and of FLUX.1's encoder with little memory."""
    return family.server


@pytest.fixture(scope="module")
def flux2_encoder() -> Encoder:
    return Encoder(flux2_vae())


@protocols
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((48, 80), {}),
        ((48, 80), {"packed": False}),
        ((48, 80), {"raw": True}),
        ((40, 56), {"raw": True, "packed": False}),
        ((48, 80), {"batch_norm_eps": 0.5}),
        ((48, 80), {"batch_norm_eps": 0.5, "packed": False, "sample": 5}),
        ((40, 56), {"packed": False, "resize": True}),
    ],
    ids=str,
)
def test_flux2(
    others: TritonServer, flux2_encoder: Encoder, protocol: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    url = others.http_url if protocol == "http" else others.grpc_url
    said = dict(options)
    if "sample" in options:
        said["sample"] = torch.Generator().manual_seed(options["sample"])
    images = pixels(*size, batch=2)
    with Client(url, protocol=protocol, model="vae_decoder_flux2") as client:
        assert_same(client.encode(images, **options), flux2_encoder.encode(images, **said), images)
        with pytest.raises(InvalidOptionError, match="scaling_factor: got 2.0.*statistics"):
            client.encode(pixels(32, 32), scaling_factor=2.0)
        with pytest.raises(InvalidImagesError, match="images: got 40x56 .*multiples of 16"):
            client.encode(pixels(40, 56), packed=False)


@protocols
def test_flux2_there_and_back(others: TritonServer, flux2_encoder: Encoder, protocol: str) -> None:
    """Latents go back with their tokens in another order, and ids that tell it."""
    height, width = SIZE
    url = others.http_url if protocol == "http" else others.grpc_url
    images = floats(*SIZE, batch=2)
    latents = flux2_encoder.encode(images)
    expected = Decoder(flux2_vae()).decode_raw(latents, height=height, width=width)
    ids = ids_of(height // 16, width // 16, 2)
    with Client(url, protocol=protocol, model="vae_decoder_flux2") as client:
        mine = client.encode(images)
        assert torch.equal(client.decode(mine.flip(1), latent_ids=ids.flip(1), output_type="raw"), expected)
        assert not torch.equal(client.decode(mine.flip(1), height=height, width=width, output_type="raw"), expected)


def test_a_memory_limit_that_is_too_small(others: TritonServer) -> None:
    with Client(others.grpc_url) as client:
        with pytest.raises(MemoryLimitError, match="memory_limit: got 9000000 bytes"):
            client.encode(pixels(1024, 1024))
        assert client.encode(pixels(32, 32)).shape == (1, 4, 64)


# -- in a pipeline ---------------------------------------------------------------------------------------------------


def embeds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "prompt_embeds": torch.randn(1, 4, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=generator),
    }


def img2img(pipe: Any, image: Image.Image) -> np.ndarray:
    generator = torch.Generator().manual_seed(4)
    options = {"num_inference_steps": 2, "strength": 0.6, "output_type": "np", "generator": generator}
    return pipe(image=image, height=image.height, width=image.width, **embeds(), **options).images


def kontext(pipe: Any, image: Image.Image) -> np.ndarray:
    return pipe(
        image=image, height=image.height, width=image.width, max_area=image.height * image.width,
        num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(4), _auto_resize=False,
        **embeds(),
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "call"), [(FluxImg2ImgPipeline, img2img), (FluxKontextPipeline, kontext)], ids=["img2img", "Kontext"]
)
def test_a_flux_pipeline_encodes_and_decodes_on_the_server(
    serving: Serving, tiny_checkpoint: Path, kind: Any, call: Any
) -> None:
    """The bits of `fluxvae.install` in this process, and not those of diffusers' own VAE."""
    vae = type(random_vae()).from_pretrained(tiny_checkpoint)
    pipe, without = (kind(**{**flux_pipeline(vae).components, "vae": one}) for one in (vae, None))
    for one in (pipe, without):
        one.set_progress_bar_config(disable=True)
    image = picture(80, 64)
    with fluxvae.install(vae):
        expected = call(pipe, image)
    own = call(pipe, image)
    assert not np.array_equal(own, expected), "the two ways cannot be told apart"
    np.testing.assert_allclose(own, expected, atol=1e-3)
    with fluxvae.client.install(pipe, serving.server.grpc_url):
        assert isinstance(pipe.vae, RemoteVAE)
        np.testing.assert_array_equal(call(pipe, image), expected)
    assert pipe.vae is vae
    with fluxvae.client.install(without, serving.server.grpc_url):
        np.testing.assert_array_equal(call(without, image), expected)


def test_a_flux2_pipeline_encodes_its_references_on_the_server(others: TritonServer) -> None:
    pipe, image = flux2_pipeline(flux2_vae()), picture(80, 64)

    def call() -> Any:
        return run(pipe, 80, 64, 1, "np", image=[image])

    with fluxvae.install(pipe.vae):
        expected = call()
    with fluxvae.client.install(pipe, others.grpc_url) as handle:
        assert handle.vae.client.encoder_model == FLUX2
        np.testing.assert_array_equal(call(), expected)


@protocols
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_remote_vae_encodes_as_a_vae_does(serving: Serving, protocol: str, dtype: torch.dtype) -> None:
    local = random_vae()
    x = (floats(40, 56, batch=2) * 2 - 1).to(dtype)
    with fluxvae.install(local):
        expected = local.encode(x.float()).latent_dist
    with Client(url_of(serving, protocol), protocol=protocol) as client:
        vae = RemoteVAE(client)
        found = vae.encode(x).latent_dist
        [(again,)] = [vae.encode(x, return_dict=False)]
    assert found.mode().dtype == dtype
    assert torch.equal(found.mode(), expected.mode().to(dtype))
    assert torch.equal(again.parameters, found.parameters)
    assert torch.equal(found.logvar, expected.parameters.to(dtype).chunk(2, dim=1)[1].clamp(-30, 20))
    if dtype == torch.float32:
        draws = [one.sample(torch.Generator().manual_seed(3)) for one in (found, expected)]
        assert torch.equal(*draws)


def test_what_the_remote_vae_refuses_to_encode(serving: Serving) -> None:
    x = torch.zeros(1, 3, 32, 32)
    with Client(serving.server.grpc_url) as client:
        vae = RemoteVAE(client)
        for bad, message in (
            (x[0], r"x: got a tensor of torch.float32 \(3, 32, 32\)"),
            (x[:, :1], r"x: got .*\(1, 1, 32, 32\)"),
            (x.to(torch.uint8), "x: got a tensor of torch.uint8"),
            (x[:0], "x: got"),
            (x[..., :30], "images: got 32x30 .*multiples of 8"),
            (x + 1.5, "images: got values from 1.5 to 1.5, expected floats in"),
            (x * torch.nan, "images: got values from nan"),
        ):
            with pytest.raises(InvalidImagesError, match=message):
                vae.encode(bad)
    with (
        Client(serving.server.grpc_url, model="vae_preview") as client,
        pytest.raises(InvalidOptionError, match="encoder_model: got None"),
    ):
        RemoteVAE(client).encode(x)
    with RemoteVAE(serving.server.grpc_url, model="vae_preview", encoder_model="vae_encoder").client as client:
        assert RemoteVAE(client).encode(x).latent_dist.mode().shape == (1, 16, 4, 4)
