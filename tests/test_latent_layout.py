"""The shape of latents (packed or not, with or without batch and frame) is read rightly for every size, or refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from family_models import flux2_vae, ids_of, tiny_vae
from fluxvae import Decoder, InvalidLatentsError, pack_latents
from fluxvae.batch.readings import read_shape
from fluxvae.batch.tensors import Lazy
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import possible_layouts, read_layout
from fluxvae.latents.packing import patchify
from fluxvae.latents.reading import Reading
from fluxvae.latents.request import LatentRequest
from models import random_vae

FLUX1 = LatentFormat()
FLUX2 = LatentFormat(channels=32, scaling_factor=1.0, shift_factor=None, flux2=True)
SD = LatentFormat(channels=4, scaling_factor=0.18215, shift_factor=None)
FORMATS = {"FLUX.1": FLUX1, "FLUX.2": FLUX2, "SD": SD}
SIDES = st.integers(1, 140)
# What makes a shape ambiguous: as many images as channels, as wide as a token has features.
BATCHES = st.one_of(st.integers(1, 5), st.sampled_from([4, 16, 32, 64, 128]))
TELLING = st.one_of(SIDES, st.sampled_from([4, 16, 32, 64, 128]))
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


def check(format: LatentFormat, shape: tuple[int, ...], *size: object, **options: object) -> tuple[int, int]:
    """By shape alone, as `Decoder.check` does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        latents = torch.empty(shape, dtype=torch.float32, device="meta")
        height, width = size or (None, None)
        request = LatentRequest.read(format, latents, Reading(height=height, width=width, raw=False, **options))
        return request.height, request.width


@formats
@given(batch=BATCHES, gh=SIDES, gw=SIDES, dy=st.integers(0, 15), dx=st.integers(0, 15))
def test_packed_latents_are_read_as_packed_at_any_size(
    format: LatentFormat, batch: int, gh: int, gw: int, dy: int, dx: int
) -> None:
    """With their height and width, multiples of 16 or not, whatever the number of images and tokens."""
    shape, size = (batch, gh * gw, format.packed_features), (16 * gh + dy, 16 * gw + dx)
    layout = read_layout(shape, [format], *size)
    assert (layout.packed, layout.shape) == (True, shape)
    assert read_layout(shape, list(FORMATS.values()), *size)[1:3] == (True, shape), "nor does another family's claim it"
    assert check(format, shape, *size) == (16 * gh, 16 * gw)
    if batch == 1:
        assert read_layout(shape[1:], [format], *size)[1:3] == (True, shape)


@formats
@given(lh=TELLING, lw=TELLING, patches=st.booleans(), given_size=st.booleans())
def test_one_image_without_its_batch_is_read_as_one_image_at_any_size(
    format: LatentFormat, lh: int, lw: int, patches: bool, given_size: bool
) -> None:
    """With its height and width always; without them too, unless as many packed images would have this shape."""
    in_patches = patches and format.flux2
    channels, scale = (4 * format.channels, 16) if in_patches else (format.channels, 8)
    shape, size = (channels, lh, lw), (scale * lh, scale * lw)
    even = in_patches or not (lh % 2 or lw % 2)
    if given_size:
        for several in ([format], list(FORMATS.values())):
            layout = read_layout(shape, several, *size)
            assert (layout.packed, layout.shape, layout.size) == (False, (1, *shape), size)
        if even:
            assert check(format, shape, *size) == size
    elif lw == format.packed_features:
        for part in ((), (size[0], None), (None, size[1])):
            with pytest.raises(InvalidLatentsError, match="packed images of .* or one image of .* pass height and"):
                read_layout(shape, [format], *part)
    else:
        assert read_layout(shape, [format])[1:] == (False, (1, *shape), size)


@given(shape=st.lists(TELLING, min_size=1, max_size=6).map(tuple), height=st.none() | SIDES, width=st.none() | SIDES)
def test_what_is_read_is_possible_and_fits_the_size(
    shape: tuple[int, ...], height: int | None, width: int | None
) -> None:
    """For any shape and size: the same values, in numbers that the format has, of the size that was given."""
    height, width = (None if side is None else 8 * side for side in (height, width))
    for format in FORMATS.values():
        try:
            layout = read_layout(shape, [format], height, width)
        except InvalidLatentsError:
            continue
        assert torch.empty(shape, device="meta").numel() == torch.empty(layout.shape, device="meta").numel()
        if layout.packed:
            assert layout.shape[2] == format.packed_features
        else:
            assert layout.size is not None
            assert layout.shape[1] == format.channels or format.flux2
            assert height in (None, layout.size[0])
            assert width in (None, layout.size[1])
        if len(possible_layouts(shape, [format])) == 2:
            assert height is not None, "both readings are possible: only the size can have decided"
            assert width is not None
            assert not layout.packed or (height // 16) * (width // 16) == layout.shape[1]


AMBIGUOUS = {
    "FLUX.1": (FLUX1, (16, 32, 64), (256, 512), (128, 64)),
    "FLUX.2": (FLUX2, (32, 48, 128), (384, 1024), (96, 128)),
    "FLUX.2 in patches": (FLUX2, (128, 6, 128), (96, 2048), (32, 48)),
    "SD": (SD, (4, 8, 16), (64, 128), (32, 64)),
}


@pytest.mark.parametrize(("format", "shape", "image", "packed"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_where_the_shape_has_two_readings_the_size_decides(
    format: LatentFormat, shape: tuple[int, ...], image: tuple[int, int], packed: tuple[int, int]
) -> None:
    assert read_layout(shape, [format], *image).shape == (1, *shape)
    assert read_layout(shape, [format], *packed).shape == shape
    for size in ((None, None), (image[0], None), (None, packed[1])):
        with pytest.raises(InvalidLatentsError) as refused:
            check(format, shape, *size)
        for words in (f"{shape[0]} packed images", f"{image[0]}x{image[1]}", "pass height and width", str((1, *shape))):
            assert words in str(refused.value)
    with pytest.raises(InvalidLatentsError, match="got 16x8000.*fit neither"):
        check(format, shape, 16, 8000)


def test_ids_mean_packed_latents() -> None:
    assert check(FLUX2, (32, 6, 128), latent_ids=ids_of(2, 3, 32)) == (32, 48)
    assert check(FLUX2, (6, 128), latent_ids=ids_of(2, 3, 1)[0]) == (32, 48)
    assert check(FLUX2, (6, 128), latent_ids=ids_of(2, 3, 1)) == (32, 48)
    with pytest.raises(InvalidLatentsError, match="latent_ids.*packed latents only"):
        check(FLUX2, (32, 6, 10), latent_ids=ids_of(2, 3, 1))
    with pytest.raises(InvalidLatentsError, match="latent_ids: got shape"):
        check(FLUX2, (1, 6, 128), latent_ids=ids_of(2, 3, 1)[0])


def test_one_frame_is_an_image_and_more_are_a_video() -> None:
    assert read_layout((2, 16, 1, 5, 7), [FLUX1])[1:] == (False, (2, 16, 5, 7), (40, 56))
    assert read_layout((16, 1, 5, 7), [FLUX1])[1:] == (False, (1, 16, 5, 7), (40, 56))
    assert read_layout((1, 128, 1, 5, 7), [FLUX2])[1:] == (False, (1, 128, 5, 7), (80, 112))
    for shape in ((1, 16, 3, 5, 7), (16, 3, 5, 7)):
        with pytest.raises(InvalidLatentsError, match="video of 3 frames"):
            check(FLUX1, shape)


REFUSED = {
    "one dimension": (FLUX1, (64,), "1 dimensions"),
    "six": (FLUX1, (1, 1, 16, 1, 4, 4), "6 dimensions"),
    "features of one image": (FLUX1, (6, 128), r"128 features per token.*FLUX.2.*shape \(6, 128\); expected 64"),
    "one SD image": (FLUX1, (4, 64, 48), r"one image without its batch they have 4 channels, which look like SD"),
    "one FLUX.2 image": (FLUX1, (32, 6, 9), r"32 channels, which look like FLUX.2.*expected \(16, height/8, width/8\)"),
    "one FLUX.1 image": (FLUX2, (16, 6, 9), r"16 channels, which look like FLUX.1.*\(128, height/16, width/16\)"),
    "one SD image as wide as FLUX.1's tokens": (FLUX1, (4, 64, 64), "height and width: got height=None"),
    "three channels": (FLUX1, (1, 3, 1, 4, 4), "3 channels"),
}


@pytest.mark.parametrize(("format", "shape", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_reading_fits_is_refused(format: LatentFormat, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidLatentsError, match=message):
        check(format, shape)


def test_a_size_that_does_not_fit_names_the_other_family() -> None:
    with pytest.raises(InvalidLatentsError, match="64 x 64 = 4096 patches.*one image without its batch.*4 channels"):
        check(FLUX1, (4, 128, 64), 1024, 1024)
    with pytest.raises(InvalidLatentsError, match="height: got 1024.*As packed latents they have 128 features.*FLUX.2"):
        check(FLUX1, (16, 4096, 128), 1024, 1024)


def test_a_list_is_refused_with_the_shape_that_is_wanted() -> None:
    with pytest.raises(InvalidLatentsError, match=r"list of 2 of tensors of shape \(16, 4, 4\).*\(batch, 16, .*stack"):
        LatentRequest.read(FLUX1, [torch.zeros(16, 4, 4)] * 2, Reading())
    with pytest.raises(InvalidLatentsError, match="torch.from_numpy"):
        LatentRequest.read(FLUX1, torch.zeros(16, 4, 4).numpy(), Reading())


def test_a_value_that_is_not_finite_is_named_by_the_callers_index() -> None:
    latents = torch.zeros(16, 4, 5)
    latents[3, 2, 1] = float("nan")
    with pytest.raises(InvalidLatentsError, match=r"nan at index \[3, 2, 1\]"):
        LatentRequest.read(FLUX1, latents, Reading())


@pytest.mark.parametrize("memory_limit", [None, "1GiB"])
def test_every_shape_of_one_image_gives_the_same_picture(memory_limit: str | None) -> None:
    """With a batch of 1, from `decode` and `decode_raw`, and of the size that `check` says."""
    latents = torch.randn(1, 16, 4, 64, generator=torch.Generator().manual_seed(0))  # ambiguous without its size
    size = {"height": 32, "width": 512}
    decoder = Decoder(random_vae(), memory_limit=memory_limit)
    expected, raw = decoder.decode(latents, output_type="pt"), decoder.decode_raw(latents)
    tokens = pack_latents(latents)
    for one in (latents[0], latents[:, :, None], latents[0, :, None], tokens, tokens[0]):
        assert decoder.check(one, **size) == (32, 512)
        assert torch.equal(decoder.decode(one, output_type="pt", **size), expected)
        assert torch.equal(decoder.decode_raw(one, **size), raw)
    assert len(decoder.decode(latents[0], **size)) == 1
    several = tokens.repeat(16, 1, 1)  # (16, 64, 64): as many images as channels, as many tokens as features
    assert decoder.check(several, **size) == (32, 512)
    assert torch.equal(decoder.decode_raw(several, **size), raw.repeat(16, 1, 1, 1))


@pytest.mark.parametrize("raw", [True, False])
def test_flux2s_shapes_of_one_image(raw: bool) -> None:
    latents = torch.randn(1, 32, 4, 6, generator=torch.Generator().manual_seed(0))
    decoder = Decoder(flux2_vae())
    expected = decoder.decode_raw(latents, raw=raw)
    for one in (latents[0], latents[0, :, None], latents[:, :, None]):
        assert torch.equal(decoder.decode_raw(one, raw=raw), expected)
    with pytest.raises(InvalidLatentsError, match="raw=True or raw=False"):
        decoder.check(latents[0])
    if not raw:
        tokens, ids = pack_latents(latents)[0], ids_of(2, 3, 1)[0]
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        for given_ids in (ids[order], ids[order][None]):
            assert torch.equal(decoder.decode_raw(tokens[order], latent_ids=given_ids), expected)
        assert torch.equal(decoder.decode_raw(patchify(latents)[0]), expected)


@pytest.mark.filterwarnings("ignore:decode. approximate preview:UserWarning")
def test_a_preview_of_one_image() -> None:
    latents = torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(0))
    decoder = Decoder(tiny_vae())
    assert torch.equal(decoder.decode_raw(latents), decoder.decode_raw(latents[None]))


# -- files -----------------------------------------------------------------------------------------------------------


def _or_error(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except InvalidLatentsError as error:
        return str(error)


@formats
@given(
    shape=st.lists(st.one_of(st.integers(1, 6), st.sampled_from([16, 32, 64, 128])), min_size=1, max_size=5).map(tuple),
    size=st.one_of(st.none(), st.tuples(st.sampled_from([16, 32, 512, 2048]), st.sampled_from([32, 64, 512, 2048]))),
    ids=st.booleans(),
)
def test_files_are_read_as_the_library_reads(
    format: LatentFormat, shape: tuple[int, ...], size: tuple[int, int] | None, ids: bool
) -> None:
    """But for a size that one row alone may have wrong: that is for the row's own check."""
    height, width = size or (None, None)
    ambiguous = len(possible_layouts(shape, [format])) > 1
    library = _or_error(lambda: read_layout(shape, [format], *((height, width) if ambiguous else ()), with_ids=ids))
    file = _or_error(lambda: read_shape(format, shape, height, width, ids=ids))
    if isinstance(library, str):
        assert file == library
    else:
        assert (file.rows, *file.shape[1:]) == library.shape
        numbers = torch.arange(math.prod(shape)).reshape(shape)
        lazy = Lazy(shape, "int64", lambda key: numbers[key])
        rows = torch.cat([file.row(lazy, row) for row in range(file.rows)])
        assert torch.equal(rows, numbers.reshape(library.shape)), "the same values in the same order"


@formats
@given(channels=st.sampled_from([4, 16, 32, 64, 128]), sides=st.tuples(TELLING, TELLING), frame=st.booleans())
def test_what_is_known_to_be_one_image_is_never_packed(
    format: LatentFormat, channels: int, sides: tuple[int, int], frame: bool
) -> None:
    shape = (channels, 1, *sides) if frame else (channels, *sides)
    read = _or_error(lambda: read_shape(format, shape, one=True))
    if channels in (format.channels, 4 * format.channels * format.flux2):
        assert read == (1, (1, channels, *sides))
    else:
        assert f"got {channels} channels" in read
