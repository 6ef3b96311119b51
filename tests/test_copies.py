"""What users copy or send to other processes survives it: decoders, plans, formats, clients and errors."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import workers
from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, FluxVAEError, InvalidLatentsError, install
from fluxvae.client import AsyncClient, Client
from models import random_vae


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def without_attention() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    return vae.eval().requires_grad_(False)


MAKERS: dict[str, Callable[[], Decoder]] = {
    "loaded": lambda: Decoder.from_pretrained("demo", device="cpu", memory_limit="200MB"),
    "winograd": lambda: Decoder(random_vae(), kernels="winograd"),
    "torch": lambda: Decoder(random_vae(), kernels="torch", rescale_dtype="float32"),
    "bfloat16": lambda: Decoder(random_vae(dtype=torch.bfloat16)),
    "channels last": lambda: Decoder(torch.nn.Module.to(random_vae(), memory_format=torch.channels_last)),
    "without attention": lambda: Decoder(without_attention()),
    "reference": lambda: Decoder(random_vae(), engine="diffusers", tiling=True),
    "flux2": lambda: Decoder(flux2_vae()),
    "preview": lambda: Decoder(tiny_vae(), memory_limit="1GB"),
}


def latents_for(decoder: Decoder, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    channels, size = (4 * decoder.format.channels, 5) if decoder.format.flux2 else (decoder.format.channels, 10)
    return torch.randn(2, channels, size, size, generator=generator, dtype=torch.float32, device="cpu")


@pytest.mark.filterwarnings("ignore::fluxvae.engine.preview.ApproximateWarning")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_copy_of_a_decoder_gives_the_same_image(maker: str, duplicate: Callable[[Any], Any]) -> None:
    decoder = MAKERS[maker]()
    latents = latents_for(decoder)
    before = duplicate(decoder)
    expected = decoder.decode(latents, output_type="pt")
    after = duplicate(decoder)
    for one in (before, after, duplicate(after)):
        assert torch.equal(one.decode(latents, output_type="pt"), expected)
        assert (one.device, one.dtype, one.memory_limit) == (decoder.device, decoder.dtype, decoder.memory_limit)
        if decoder.engine.name != "diffusers":
            assert one.plan(128, 96, 2).peak_bytes == decoder.plan(128, 96, 2).peak_bytes
    assert torch.equal(decoder.decode(latents, output_type="pt"), expected), "the original is as it was"


def test_a_deep_copy_has_weights_of_its_own() -> None:
    decoder = Decoder(flux2_vae())
    latents = latents_for(decoder)
    expected = decoder.decode(latents, output_type="pt")
    duplicate = copy.deepcopy(decoder)
    with torch.no_grad():
        decoder.vae.decoder.conv_out.bias.add_(0.5)
        decoder.vae.bn.running_mean.add_(0.5)
    assert torch.equal(duplicate.decode(latents, output_type="pt"), expected)
    with torch.no_grad():
        duplicate.vae.bn.running_mean.add_(0.5)
    changed = duplicate.decode(latents, output_type="pt")
    assert not torch.equal(changed, expected), "its format reads its own statistics"


def test_a_copy_can_be_made_while_the_original_decodes() -> None:
    decoder = Decoder(random_vae(), kernels="torch")
    latents = latents_for(decoder)
    copies: list[Any] = []

    def copy_once(done: int, total: int) -> None:
        if not copies:
            copies.append(copy.deepcopy(decoder))
            copies.append(copies[0].decode(latents, output_type="pt"))

    expected = decoder.decode(latents, output_type="pt", progress=copy_once)
    assert torch.equal(copies[1], expected), "the copy's lock was not the one that the decode held"


def test_a_spawned_process_carries_a_decoder_and_brings_errors_back() -> None:
    decoder = Decoder(random_vae())
    latents = latents_for(decoder)
    expected = decoder.decode(latents, output_type="uint8")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        image = pool.submit(workers.decode, decoder, latents).result(timeout=100)
        assert np.array_equal(image, expected)
        with pytest.raises(InvalidLatentsError, match="latents: "):
            pool.submit(workers.decode, decoder, latents[:, :3]).result(timeout=100)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_of_an_installed_vae_decodes_with_its_own_engine(duplicate: Callable[[Any], Any]) -> None:
    vae = random_vae()
    handle = install(vae)
    raw = torch.randn(1, 16, 8, 8, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float32, device="cpu")
    expected = vae.decode(raw).sample
    again = duplicate(vae)
    assert torch.equal(again.decode(raw).sample, expected)
    assert again._decode.__self__.vae is again
    other = duplicate(handle)
    other.remove()
    assert "_decode" not in other.vae.__dict__
    assert "_decode" in vae.__dict__


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("maker", ["winograd", "flux2", "preview"])
def test_copies_of_formats_and_plans(maker: str, duplicate: Callable[[Any], Any]) -> None:
    decoder = MAKERS[maker]()
    plan = decoder.plan(128, 128)
    assert duplicate(plan) == plan
    assert str(duplicate(plan)) == str(plan)
    assert str(duplicate(decoder.format)) == str(decoder.format)


def _below(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(_below(one) for one in kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(_below(FluxVAEError), key=lambda kind: kind.__name__))
def test_every_error_survives_a_worker_pool(kind: type[Exception]) -> None:
    """A pool pickles what a worker raised; an error that cannot be made from its ``args`` breaks the whole pool."""
    error = kind("height: got 7, expected a multiple of 8")
    error.__notes__ = ["of latents.npy"]  # as add_note does, which Python 3.10 does not have
    again = pickled(error)
    assert type(again) is kind
    assert (again.args, str(again), again.__notes__) == (error.args, str(error), error.__notes__)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_client_is_carried_without_its_connection(kind: Any, duplicate: Callable[[Any], Any]) -> None:
    for protocol in ("grpc", "http"):
        client = kind("localhost:9", protocol=protocol, model="vae_preview", timeout_s=7.0, retries=0)
        again = duplicate(client)
        assert (again.url, again._protocol, again.model) == ("localhost:9", protocol, "vae_preview")
        assert (again._timeout_s, again._retries) == (7.0, 0)
        assert again._transport is not client._transport
        assert type(again._transport) is type(client._transport)
        if kind is Client:
            client.close()
            again.close()


def test_copies_have_locks_of_their_own() -> None:
    decoder = Decoder(random_vae(), engine="diffusers")
    duplicate = copy.deepcopy(decoder)
    assert isinstance(decoder.engine._lock, type(threading.Lock()))
    assert duplicate.engine._lock is not decoder.engine._lock
