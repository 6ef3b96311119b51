"""`fluxvae.install` inside real diffusers pipelines.

Offloading from a GPU is not covered (accelerate's hooks are exercised on the CPU), nor are pipelines other than FLUX's.
"""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_models import Shape, one_thread, rms, true_decode
from fluxvae.engine.exact import ExactDecoder, ExactEncoder
from fluxvae.errors import InvalidOptionError, MemoryLimitError
from fluxvae.install import install
from models import flux_pipeline, random_vae, run_pipeline

__all__ = ["one_thread"]  # a fixture, found by its name
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vae() -> AutoencoderKL:
    return Shape().vae()


@pytest.fixture
def raw() -> torch.Tensor:
    return Shape(batch=2).latents()


def decode(vae: AutoencoderKL, raw: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(raw, **options)[0]


@settings(max_examples=6)
@given(height=st.integers(1, 6), width=st.integers(1, 6), batch=st.integers(1, 2), slicing=st.booleans())
def test_a_flux_pipeline_decodes_exactly_and_as_before_once_removed(
    height: int, width: int, batch: int, slicing: bool
) -> None:
    pipe = flux_pipeline(random_vae())
    size = (16 * height, 16 * width, batch)
    pipe.vae.use_slicing = slicing
    before = run_pipeline(pipe, *size, "pt")
    latents = run_pipeline(pipe, *size, "latent")
    handle = install(pipe.vae, memory_limit="1GiB")
    exact = run_pipeline(pipe, *size, "pt")
    scaled = pipe._unpack_latents(latents, size[0], size[1], pipe.vae_scale_factor)
    raw = scaled / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    assert torch.equal(exact, (ExactDecoder(pipe.vae).decode(raw) / 2 + 0.5).clamp(0, 1))
    assert float((exact - before).abs().max()) < 1e-4
    handle.remove()
    assert torch.equal(run_pipeline(pipe, *size, "pt"), before)


def test_it_is_the_engine_that_decodes(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    truth = true_decode(vae, raw)
    expected = ExactDecoder(vae).decode(raw)
    with install(vae):
        assert torch.equal(decode(vae, raw), expected)
        assert torch.equal(decode(vae, raw, return_dict=False), expected)
        with torch.no_grad():
            assert torch.equal(vae.decode(raw).sample, expected)
        vae.enable_slicing()
        assert torch.equal(decode(vae, raw), expected)
    assert rms(expected - truth) < 1e-5


def test_remove_undoes_it_exactly(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    attributes, before = set(vae.__dict__), decode(vae, raw)
    handle = install(vae)
    handle.remove()
    assert set(vae.__dict__) == attributes
    assert torch.equal(decode(vae, raw), before)
    handle.remove()
    install(vae).remove()


def test_the_limit_holds_inside_the_pipeline(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    with install(vae, memory_limit=1000), pytest.raises(MemoryLimitError, match="memory_limit: got 1000 bytes"):
        decode(vae, raw)
    assert decode(vae, raw).shape == (2, 3, 24, 20)


def test_offload_hooks_run_as_before(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    """What accelerate's model offload does: a hook on the VAE that `decode` runs through `apply_forward_hook`."""
    expected = ExactDecoder(vae).decode(raw)
    calls: list[str] = []

    class Recorder(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: object, **kwargs: object) -> tuple[object, object]:
            calls.append("pre_forward")
            return args, kwargs

    add_hook_to_module(vae, Recorder())
    with install(vae):
        assert torch.equal(decode(vae, raw), expected)
        assert calls == ["pre_forward"]
    decode(vae, raw)
    assert calls == ["pre_forward", "pre_forward"]


def test_parts_offloaded_to_meta_are_refused(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    install(vae)
    vae.decoder.to("meta")
    with pytest.raises(InvalidOptionError, match="meta"):
        decode(vae, raw)


def test_tiling_is_refused_before_and_after(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    vae.enable_tiling()
    with pytest.raises(InvalidOptionError, match="use_tiling: got True"):
        install(vae)
    vae.disable_tiling()
    with install(vae):
        vae.enable_tiling()
        with pytest.raises(InvalidOptionError, match="use_tiling: got True"):
            decode(vae, raw)
        vae.disable_tiling()
        decode(vae, raw)


def test_a_second_install_is_refused(vae: AutoencoderKL) -> None:
    with install(vae), pytest.raises(InvalidOptionError, match="replaced already"):
        install(vae)


def test_gradients_are_refused(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    with install(vae), pytest.raises(InvalidOptionError, match="gradients"):
        vae.decode(raw.requires_grad_())


def test_a_foreign_replacement_is_not_thrown_away(vae: AutoencoderKL) -> None:
    handle = install(vae)
    vae._decode = lambda z: None
    with pytest.raises(InvalidOptionError, match="did not put there"):
        handle.remove()


# -- the way back --------------------------------------------------------------------------------------------------


def test_encode_is_exact_and_its_distribution_diffusers_own() -> None:
    vae = random_vae()
    pixels = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        with install(vae, memory_limit="1GiB") as handle:
            assert handle.encoder is not None
            inside = vae.encode(pixels).latent_dist
            assert type(inside) is type(before)
            assert torch.equal(inside.parameters, ExactEncoder(vae).encode(pixels))
            assert torch.equal(vae.encode(pixels, return_dict=False)[0].mean, inside.mean)
            vae.use_slicing = True
            assert torch.equal(vae.encode(pixels).latent_dist.mean, inside.mean)
            drawn = inside.sample(torch.Generator().manual_seed(1))
        assert torch.allclose(inside.mean, before.mean, atol=1e-4)
        assert torch.allclose(drawn, before.sample(torch.Generator().manual_seed(1)), atol=1e-3)
        assert "_encode" not in vae.__dict__
        assert torch.equal(vae.encode(pixels[:1]).latent_dist.mean, before.mean[:1]) or vae.use_slicing


def test_the_limit_holds_for_encode_too() -> None:
    vae = random_vae()
    smallest = ExactEncoder(vae).smallest_limit(48, 64, 1)
    pixels = torch.zeros(1, 3, 48, 64)
    with install(vae, memory_limit=smallest), torch.no_grad():
        vae.encode(pixels)
    with (
        install(vae, memory_limit=smallest - 1),
        torch.no_grad(),
        pytest.raises(MemoryLimitError, match="memory_limit: .*encoding"),
    ):
        vae.encode(pixels)


def test_encode_refuses_tiles_and_gradients() -> None:
    vae = random_vae()
    pixels = torch.zeros(1, 3, 32, 32)
    with install(vae):
        vae.enable_tiling()
        with torch.no_grad(), pytest.raises(InvalidOptionError, match="use_tiling"):
            vae.encode(pixels)
        vae.disable_tiling()
        with pytest.raises(InvalidOptionError, match="got images to encode while gradients are recorded"):
            vae.encode(pixels.requires_grad_())
        vae.train()
        vae.encoder.requires_grad_(True)
        with pytest.raises(InvalidOptionError, match="gradients"):
            vae.encode(pixels.detach())


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_alone(half: str) -> None:
    vae = random_vae()
    setattr(vae, half, None)
    handle = install(vae)
    assert (handle.encoder is None, handle.decoder is None) == (half == "encoder", half == "decoder")
    assert [name for name in ("_decode", "_encode") if name in vae.__dict__] == [
        "_decode" if half == "encoder" else "_encode"
    ]
    handle.remove()
    handle.remove()
    assert not {"_decode", "_encode"} & set(vae.__dict__)


def test_a_model_with_neither_half_is_refused() -> None:
    vae = random_vae()
    vae.encoder = vae.decoder = None
    with pytest.raises(InvalidOptionError, match="with a decoder"):
        install(vae)


def test_removing_names_what_was_replaced_meanwhile() -> None:
    vae = random_vae()
    handle = install(vae)
    mine = vae._encode
    vae._encode = print
    with pytest.raises(InvalidOptionError, match="got a _encode that fluxvae.install did not put there"):
        handle.remove()
    assert "_decode" in vae.__dict__, "nothing is undone by halves"
    vae._encode = mine
    handle.remove()
