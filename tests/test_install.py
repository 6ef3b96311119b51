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
from fluxvae.engine.exact import ExactEngine
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
    assert torch.equal(exact, (ExactEngine(pipe.vae).decode(raw) / 2 + 0.5).clamp(0, 1))
    assert float((exact - before).abs().max()) < 1e-4
    handle.remove()
    assert torch.equal(run_pipeline(pipe, *size, "pt"), before)


def test_it_is_the_engine_that_decodes(vae: AutoencoderKL, raw: torch.Tensor) -> None:
    truth = true_decode(vae, raw)
    expected = ExactEngine(vae).decode(raw)
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
    expected = ExactEngine(vae).decode(raw)
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
