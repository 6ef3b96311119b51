"""Packing, sizes and the checks of latents, which are pure functions: what each returns, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline, FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from family_models import flux2_vae, ids_of, tiny_vae
from fluxvae import (
    CheckpointError,
    InvalidLatentsError,
    InvalidOptionError,
    SizeFlooredWarning,
    pack_latents,
    unpack_latents,
)
from fluxvae.latents import packing
from fluxvae.latents.checks import check_options
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.packing import patchify, unpatchify
from fluxvae.latents.reading import Reading
from fluxvae.latents.request import LatentRequest

FORMAT = LatentFormat()
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


def size_of(
    format: LatentFormat, latents: object, height: object = None, width: object = None, **said: object
) -> tuple[int, int]:
    request = LatentRequest.read(format, latents, Reading(height=height, width=width, **said))
    return request.height, request.width


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
            size = size_of(FORMAT, latents, height, width)
    else:
        size = size_of(FORMAT, latents, height, width)
    assert size == (16 * gh, 16 * gw)


@given(height=st.integers(-20, 400), width=st.integers(-20, 400), patches=st.integers(1, 600))
def test_a_patch_count_that_does_not_fit_is_refused(height: int, width: int, patches: int) -> None:
    fits = height > 0 and width > 0 and (height // 16) * (width // 16) == patches
    latents = torch.zeros(1, patches, 64)
    if fits:
        return
    with pytest.raises(InvalidLatentsError, match="height|width"):
        size_of(FORMAT, latents, height, width)


def test_rescaling_is_flux_pipelines_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        latents = torch.randn(2, 16, 4, 4).to(dtype)
        raw = FORMAT.to_raw(latents)
        assert raw.dtype == dtype
        assert torch.equal(raw, (latents / 0.3611) + 0.1159)
        assert torch.equal(
            FORMAT.to_raw(latents, Reading(scaling_factor=1.5305, shift_factor=0.0609)), (latents / 1.5305) + 0.0609
        )


def test_a_checkpoint_without_a_shift_only_scales() -> None:
    config = {"latent_channels": 4, "block_out_channels": [8, 8], "scaling_factor": 0.13025, "shift_factor": None}
    format = LatentFormat.from_config(config)
    assert (format.packed_features, format.packed_multiple) == (16, 4)
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(format.to_raw(latents), latents / 0.13025)


def test_numpy_integers_are_sizes() -> None:
    assert size_of(FORMAT, torch.zeros(1, 6, 64), np.int32(32), np.int64(48)) == (32, 48)


def test_a_reading_says_what_is_said_and_leaves_the_rest_to_another() -> None:
    job, file = Reading(height=64, raw=False), Reading(height=32, width=48, raw=True, shift_factor=0)
    assert job.over(file) == Reading(height=64, width=48, raw=False, shift_factor=0)
    assert (file.parameters(), Reading().parameters()) == ({"shift_factor": 0.0, "raw": True}, {})
    with pytest.raises(FrozenInstanceError):
        job.height = 32


def test_requests_with_one_key_are_joined_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 6, 128, generator=generator)
    ids = torch.stack([ids_of(2, 3, 1)[0][torch.randperm(6, generator=generator)] for _ in range(3)])
    parts = [slice(0, 2), slice(2, 3)]
    requests = [LatentRequest.read(FLUX2, tokens[part], Reading(latent_ids=ids[part])) for part in parts]
    assert requests[0].key == requests[1].key
    together, whole = LatentRequest.together(requests), LatentRequest.read(FLUX2, tokens, Reading(latent_ids=ids))
    assert (together.batch, together.pixels) == (3, 3 * 32 * 48)
    expected = whole.raw_latents(tokens.device, tokens.dtype)
    assert torch.equal(together.raw_latents(tokens.device, tokens.dtype), expected)
    others = ({"latent_ids": ids}, {}, {"raw": True}, {"batch_norm_eps": 1e-5})
    keys = {LatentRequest.read(FLUX2, tokens, Reading(height=32, width=48, **said)).key for said in others}
    keys.add(LatentRequest.read(FLUX2, tokens, Reading(height=48, width=32)).key)
    assert len(keys) == 5, "whatever changes the picture"


def test_modules_import_only_from_those_before_them() -> None:
    order = ["packing", "reading", "format", "layout", "checks", "values", "request"]
    folder = Path(packing.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", *order}
    for place, name in enumerate(order):
        found = re.findall(r"fluxvae\.latents\.(\w+)", (folder / f"{name}.py").read_text(encoding="utf-8"))
        assert set(found) <= set(order[:place]), name


TOKENS = torch.zeros(1, 4, 64)
NAN = TOKENS.clone()
NAN[0, 2, 5] = float("nan")
BAD = {
    "array": (TOKENS.numpy(), 32, 32, "torch.Tensor"),
    "rank 1": (TOKENS[0, 0], 32, 32, r"1 dimensions, shape \(64,\)"),
    "rank 6": (TOKENS[None, None, None], 32, 32, "6 dimensions"),
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
        size_of(FORMAT, latents, height, width)


@pytest.mark.parametrize("factors", [(0, None), (float("nan"), None), (None, float("inf")), ("1", None), (True, None)])
def test_bad_factors_are_refused(factors: tuple) -> None:
    with pytest.raises(InvalidOptionError, match="factor"):
        check_options(FORMAT, Reading(scaling_factor=factors[0], shift_factor=factors[1]))


@pytest.mark.parametrize("shape", [(16, 4, 4), (1, 16, 3, 4), (1, 16, 4, 5), (0, 16, 4, 4)])
def test_what_cannot_be_packed_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidLatentsError, match="even"):
        pack_latents(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 64), (1, 4, 63), (1, 0, 64)])
def test_what_cannot_be_unpacked_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidLatentsError, match="packed"):
        unpack_latents(torch.zeros(shape), 32, 32)


# -- FLUX.2 --------------------------------------------------------------------------------------------------------

FLUX2 = LatentFormat.from_vae(flux2_vae())
TAEF2 = LatentFormat.from_vae(tiny_vae(32))


@given(GRIDS, st.integers(0, 99), st.booleans())
def test_position_ids_place_tokens_as_flux2_pipeline_does(grid: tuple[int, int, int], seed: int, sized: bool) -> None:
    batch, gh, gw = grid
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, gh * gw, 128, generator=generator)
    ids = torch.stack([ids_of(gh, gw, 1)[0][torch.randperm(gh * gw, generator=generator)] for _ in range(batch)])
    size = {"height": 16 * gh, "width": 16 * gw} if sized else {}
    assert size_of(FLUX2, tokens, latent_ids=ids, **size) == (16 * gh, 16 * gw)
    patches = Flux2Pipeline._unpack_latents_with_ids(tokens, ids)
    expected = Flux2Pipeline._unpatchify_latents(patches)
    request = LatentRequest.read(FLUX2, tokens, Reading(latent_ids=ids, raw=True, **size))
    assert torch.equal(request.raw_latents(tokens.device, tokens.dtype), expected)
    assert torch.equal(unpatchify(patches), expected)
    assert torch.equal(patchify(expected), patches)
    assert torch.equal(patchify(expected), Flux2Pipeline._patchify_latents(expected))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1), st.data())
def test_any_place_named_twice_or_not_at_all_is_refused(gh: int, gw: int, image: int, data: st.DataObject) -> None:
    """One id of a good set moved anywhere else, in either image of a batch."""
    tokens, ids = torch.zeros(2, gh * gw, 128), ids_of(gh, gw, 2).clone()
    token = data.draw(st.integers(0, gh * gw - 1))
    column = data.draw(st.sampled_from([1, 2]))
    moved = data.draw(st.integers(-3, 8).filter(lambda v: v != ids[image, token, column]))
    ids[image, token, column] = moved
    for size in ({}, {"height": 16 * gh, "width": 16 * gw}):
        with pytest.raises(InvalidLatentsError, match="latent_ids"):
            size_of(FLUX2, tokens, latent_ids=ids, **size)


IDS = ids_of(2, 2, 1)
BAD_IDS = {
    "array": (IDS.numpy(), "torch.Tensor"),
    "rank": (IDS[0], r"shape \(4, 4\), expected \(1, 4, 4\)"),
    "three columns": (IDS[..., :3], "shape"),
    "batch": (ids_of(2, 2, 2), "shape"),
    "floats": (IDS.float(), "whole numbers"),
    "bool": (IDS.bool(), "whole numbers"),
    "reference image": (IDS + torch.tensor([10, 0, 0, 0]), "t or l other than 0"),
    "layer": (IDS + torch.tensor([0, 0, 0, 1]), "t or l other than 0"),
    "huge": (IDS * (1 << 40), "outside|exactly once"),
    "all one place": (IDS * 0, "exactly once"),
}


@pytest.mark.parametrize(("ids", "message"), BAD_IDS.values(), ids=BAD_IDS.keys())
def test_bad_ids_are_refused_by_name(ids: object, message: str) -> None:
    for size in ({}, {"height": 32, "width": 32}):
        with pytest.raises(InvalidLatentsError, match=f"latent_ids.*({message})"):
            size_of(FLUX2, torch.zeros(1, 4, 128), latent_ids=ids, **size)


def test_ids_where_they_mean_nothing_are_refused() -> None:
    with pytest.raises(InvalidLatentsError, match="latent_ids.*another's"):
        size_of(FORMAT, TOKENS, 32, 32, latent_ids=IDS)
    with pytest.raises(InvalidLatentsError, match="latent_ids.*packed latents only"):
        size_of(FLUX2, torch.zeros(1, 128, 2, 2), latent_ids=IDS)
    with pytest.raises(InvalidLatentsError, match="grid of 2 x 1"):
        size_of(FLUX2, torch.zeros(1, 4, 128), 32, 16, latent_ids=IDS)


def test_the_other_family_is_named() -> None:
    with pytest.raises(InvalidLatentsError, match="64 features per token.*looks like FLUX.1.*expected 128.*FLUX.2"):
        size_of(FLUX2, TOKENS, 32, 32)
    with pytest.raises(InvalidLatentsError, match="128 features per token.*looks like FLUX.2.*expected 64.*FLUX.1"):
        size_of(FORMAT, torch.zeros(1, 4, 128), 32, 32)
    with pytest.raises(InvalidLatentsError, match="16 channels.*looks like FLUX.1"):
        size_of(FLUX2, torch.zeros(1, 16, 2, 2))
    for channels in (32, 128):
        with pytest.raises(InvalidLatentsError, match=f"{channels} channels.*looks like FLUX.2"):
            size_of(FORMAT, torch.zeros(1, channels, 2, 2))


def test_flux2s_unpacked_latents_must_say_whether_they_are_raw() -> None:
    latents = torch.zeros(1, 32, 4, 6)
    with pytest.raises(InvalidLatentsError, match="raw=True or raw=False"):
        size_of(FLUX2, latents)
    assert size_of(FLUX2, latents, raw=True) == size_of(FLUX2, latents, raw=False) == (32, 48)
    assert size_of(FLUX2, torch.zeros(1, 128, 2, 3)) == (32, 48)
    assert size_of(FLUX2, torch.zeros(1, 32, 3, 5), raw=True) == (24, 40), "raw ones of odd sizes decode"
    with pytest.raises(InvalidLatentsError, match="even"):
        size_of(FLUX2, torch.zeros(1, 32, 3, 4), raw=False)
    assert size_of(FORMAT, torch.zeros(1, 16, 4, 4), raw=True) == (32, 32)
    with pytest.raises(InvalidOptionError, match="raw: got 1"):
        size_of(FORMAT, torch.zeros(1, 16, 4, 4), raw=1)


def test_the_eps_is_the_checkpoints_unless_given() -> None:
    """ERNIE-Image's own is 1e-5: what its pipeline computes, from its own lines."""
    vae = flux2_vae()
    patches = torch.randn(1, 128, 2, 3)
    for eps in (None, 1e-5, 0.0):
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + (1e-4 if eps is None else eps))
        expected = Flux2Pipeline._unpatchify_latents(patches * std + vae.bn.running_mean.view(1, -1, 1, 1))
        format = LatentFormat.from_vae(vae)
        assert torch.equal(format.to_raw(patches, Reading(batch_norm_eps=eps)), expected)
    assert not torch.equal(FLUX2.to_raw(patches), FLUX2.to_raw(patches, Reading(batch_norm_eps=1e-5)))


WRONG_OPTIONS = [
    (FLUX2, {"scaling_factor": 0.3611}, "scaling_factor: got 0.3611; this checkpoint has BatchNorm"),
    (FLUX2, {"shift_factor": 0.1159}, "shift_factor: got 0.1159; this checkpoint has BatchNorm"),
    (FLUX2, {"batch_norm_eps": -1.0}, "batch_norm_eps: got -1.0, expected 0 or more"),
    (FLUX2, {"batch_norm_eps": float("nan")}, "batch_norm_eps: got nan"),
    (FLUX2, {"batch_norm_eps": 1e-5, "raw": True}, "batch_norm_eps: got 1e-05 with raw=True"),
    (FORMAT, {"batch_norm_eps": 1e-5}, "batch_norm_eps: got 1e-05; this checkpoint has scaling_factor"),
    (FORMAT, {"scaling_factor": 0.5, "raw": True}, "scaling_factor: got 0.5 with raw=True"),
    (TAEF2, {"scaling_factor": 0.5}, "scaling_factor: got 0.5; a preview"),
    (TAEF2, {"raw": True}, "raw: got True; a preview"),
]


@pytest.mark.parametrize(("format", "options", "message"), WRONG_OPTIONS)
def test_options_without_a_place_are_refused(format: LatentFormat, options: dict, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        check_options(format, Reading(**options))


def test_sdxls_mean_and_deviation_are_its_pipelines() -> None:
    mean, std = [0.1, -0.2, 0.3, 0.4], [0.9, 1.1, 1.2, 0.8]
    config = {"latent_channels": 4, "block_out_channels": [8] * 4, "scaling_factor": 0.13025}
    format = LatentFormat.from_config(config | {"latents_mean": mean, "latents_std": std})
    latents = torch.randn(2, 4, 3, 5)
    view = [torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std)]
    assert torch.equal(format.to_raw(latents), latents * view[1] / 0.13025 + view[0])
    assert torch.equal(LatentFormat.from_config(config | {"latents_mean": mean}).to_raw(latents), latents / 0.13025)
    with pytest.raises(InvalidOptionError, match="latents_mean instead"):
        check_options(format, Reading(shift_factor=0.1))
    for wrong in ({"latents_mean": mean[:3]}, {"shift_factor": 0.1}):
        with pytest.raises(CheckpointError, match="latents_mean"):
            LatentFormat.from_config(config | {"latents_mean": mean, "latents_std": std} | wrong)


def test_arithmetic_is_the_same_whatever_the_processs_defaults_are() -> None:
    """The default dtype, the default device and autocast are nobody's business here."""
    sdxl = LatentFormat(4, 8, 0.13025, None, latents_mean=(0.1, -0.2, 0.3, 0.4), latents_std=(0.9, 1.1, 1.2, 0.8))
    for dtype in (torch.float32, torch.bfloat16):
        for format, shape in ((sdxl, (1, 4, 2, 2)), (FORMAT, (1, 16, 2, 2)), (FLUX2, (1, 128, 2, 2))):
            latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            expected = format.to_raw(latents)
            torch.set_default_dtype(torch.bfloat16)
            try:
                with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
                    found = format.to_raw(latents)
            finally:
                torch.set_default_dtype(torch.float32)
            assert found.dtype == dtype
            assert torch.equal(found, expected)


def test_what_previews_expect() -> None:
    """TAEF1 and TAEF2: the transformer's latents as they are; only the layout differs."""
    latents = torch.randn(1, 32, 4, 4)
    assert torch.equal(TAEF2.to_raw(latents), latents)
    assert torch.equal(TAEF2.to_raw(patchify(latents)), latents)
    assert size_of(TAEF2, torch.zeros(1, 4, 128), latent_ids=IDS) == (32, 32)
    assert (TAEF2.vae_scale_factor, TAEF2.preview, FLUX2.preview) == (8, True, False)
