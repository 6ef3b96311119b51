"""Packing, sizes and validation: pure functions, and what each refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from fluxvae import InvalidLatentsError, InvalidOptionError, SizeFlooredWarning, pack_latents, unpack_latents
from fluxvae.latents import LatentFormat

FORMAT = LatentFormat()
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


@given(GRIDS)
def test_packing_is_flux_pipelines(grid: tuple[int, int, int]) -> None:
    batch, gh, gw = grid
    latents = torch.randn(batch, 16, 2 * gh, 2 * gw)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, batch, 16, 2 * gh, 2 * gw))
    assert torch.equal(
        unpack_latents(packed, 16 * gh, 16 * gw), FluxPipeline._unpack_latents(packed, 16 * gh, 16 * gw, 8)
    )
    assert torch.equal(unpack_latents(packed, 16 * gh, 16 * gw), latents)


@given(GRIDS, st.integers(0, 15), st.integers(0, 15))
def test_sizes_are_floored_with_a_warning_that_names_them(grid: tuple[int, int, int], dy: int, dx: int) -> None:
    batch, gh, gw = grid
    latents = torch.randn(batch, gh * gw, 64)
    height, width = 16 * gh + dy, 16 * gw + dx
    if dy or dx:
        with pytest.warns(SizeFlooredWarning, match=f"{height}x{width}.*decoding {16 * gh}x{16 * gw}"):
            size = FORMAT.check(latents, height, width)
    else:
        size = FORMAT.check(latents, height, width)
    assert size == (16 * gh, 16 * gw)


@given(height=st.integers(-20, 400), width=st.integers(-20, 400), patches=st.integers(1, 600))
def test_a_patch_count_that_does_not_fit_is_refused(height: int, width: int, patches: int) -> None:
    fits = height > 0 and width > 0 and (height // 16) * (width // 16) == patches
    latents = torch.zeros(1, patches, 64)
    if fits:
        return
    with pytest.raises(InvalidLatentsError, match="height|width"):
        FORMAT.check(latents, height, width)


def test_rescaling_is_flux_pipelines_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        latents = torch.randn(2, 16, 4, 4).to(dtype)
        raw = FORMAT.to_raw(latents)
        assert raw.dtype == dtype
        assert torch.equal(raw, (latents / 0.3611) + 0.1159)
        assert torch.equal(FORMAT.to_raw(latents, 1.5305, 0.0609), (latents / 1.5305) + 0.0609)


def test_a_checkpoint_without_a_shift_only_scales() -> None:
    config = {"latent_channels": 4, "block_out_channels": [8, 8], "scaling_factor": 0.13025, "shift_factor": None}
    format = LatentFormat.from_config(config)
    assert (format.packed_features, format.packed_multiple) == (16, 4)
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(format.to_raw(latents), latents / 0.13025)


def test_numpy_integers_are_sizes() -> None:
    assert FORMAT.check(torch.zeros(1, 6, 64), np.int32(32), np.int64(48)) == (32, 48)


TOKENS = torch.zeros(1, 4, 64)
NAN = TOKENS.clone()
NAN[0, 2, 5] = float("nan")
BAD = {
    "array": (TOKENS.numpy(), 32, 32, "torch.Tensor"),
    "rank 2": (TOKENS[0], 32, 32, r"2 dimensions, shape \(4, 64\)"),
    "rank 5": (TOKENS[None, None], 32, 32, "5 dimensions"),
    "FLUX.2 features": (torch.zeros(1, 4, 128), 32, 32, "128 features per token, which looks like FLUX.2.*expected 64"),
    "odd features": (torch.zeros(1, 4, 60), 32, 32, "60 features"),
    "no height": (TOKENS, None, 32, "height=None"),
    "no width": (TOKENS, 32, None, "width=None"),
    "patch count": (TOKENS, 32, 48, r"2 x 3 = 6 patches.*hold 4"),
    "too small": (TOKENS, 15, 15, "0 x 0 = 0 patches"),
    "zero": (TOKENS, 0, 32, "height: got 0"),
    "negative": (TOKENS, 32, -32, "width: got -32"),
    "float": (TOKENS, 32.0, 32, "height: got 32.0 .float"),
    "bool": (TOKENS, True, 32, "height: got True"),
    "string": (TOKENS, "32", 32, "height: got '32'"),
    "float64": (TOKENS.double(), 32, 32, "torch.float64"),
    "integers": (TOKENS.int(), 32, 32, "torch.int32"),
    "empty batch": (TOKENS[:0], 32, 32, "holds no values"),
    "no patches": (TOKENS[:, :0], 32, 32, "holds no values"),
    "NaN": (NAN, 32, 32, r"nan at index \[0, 2, 5\] \(1 of 256"),
    "Inf": (TOKENS + float("inf"), 32, 32, r"inf at index \[0, 0, 0\] \(256 of 256"),
    "channels": (torch.zeros(1, 4, 4, 4), None, None, "4 channels"),
    "unpacked height": (torch.zeros(1, 16, 4, 4), 16, None, "height: got 16.*pass 32"),
}


@pytest.mark.parametrize(("latents", "height", "width", "message"), BAD.values(), ids=BAD.keys())
def test_bad_latents_are_refused_by_name(latents: object, height: object, width: object, message: str) -> None:
    with pytest.raises(InvalidLatentsError, match=message):
        FORMAT.check(latents, height, width)


@pytest.mark.parametrize("factors", [(0, None), (float("nan"), None), (None, float("inf")), ("1", None), (True, None)])
def test_bad_factors_are_refused(factors: tuple) -> None:
    with pytest.raises(InvalidOptionError, match="factor"):
        FORMAT.to_raw(torch.zeros(1, 16, 2, 2), *factors)


@pytest.mark.parametrize("shape", [(16, 4, 4), (1, 16, 3, 4), (1, 16, 4, 5), (0, 16, 4, 4)])
def test_what_cannot_be_packed_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidLatentsError, match="even"):
        pack_latents(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 64), (1, 4, 63), (1, 0, 64)])
def test_what_cannot_be_unpacked_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidLatentsError, match="packed"):
        unpack_latents(torch.zeros(shape), 32, 32)
