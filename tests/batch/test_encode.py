"""``fluxvae encode``: what it reads, what it makes pictures fit, what it writes, and what it refuses by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file
from skimage import data
from typer.testing import CliRunner

from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, Encoder, InvalidOptionError, cli, pack_latents
from fluxvae.batch import EncodeJob, encode_files
from fluxvae.batch.albums import open_album
from fluxvae.batch.fitting import Buckets, Fit, bucket_sizes, fit
from fluxvae.checkpoints import weights_files
from fluxvae.claims import MAX_PICTURE_PIXELS
from fluxvae.errors import InvalidImagesError

from .jobs import CPU, failures, files

RNG = np.random.default_rng(3)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder.from_pretrained("demo", device="cpu")


def encode(*arguments: str | Path) -> Result:
    """Run ``fluxvae encode`` in this process."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["encode", *map(str, arguments), *CPU])


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def picture(height: int = 64, width: int = 48) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def latents(path: Path) -> torch.Tensor:
    return load_file(path)["latents"]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# -- what it reads -------------------------------------------------------------------------------------------------


def test_a_folder_there_and_back(tmp_path: Path, encoder: Encoder, demo: Decoder) -> None:
    """The files are the library's latents, and `fluxvae decode` needs nothing else to read them."""
    pictures = {"a.png": picture(), "below/b.webp": picture(32, 80), "c.bmp": picture(48, 48).convert("L")}
    for name, image in pictures.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "in" / name, lossless=True)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    told = json.loads(encode(tmp_path / "in", "-o", tmp_path / "out", "--json").stdout)
    assert (told["encoded"], told["failed"], told["left"]) == (3, 0, 0)
    assert files(tmp_path / "out") == {"a.safetensors", "below/b.safetensors", "c.safetensors", "job.json"}
    for name, image in pictures.items():
        path = (tmp_path / "out" / name).with_suffix(".safetensors")
        assert torch.equal(latents(path), encoder.encode(image))
        said = metadata(path)
        assert (said["height"], said["width"]) == (str(image.height), str(image.width))
        assert said["source"] == str(tmp_path / "in" / name)
        assert len(said["checkpoint_sha256"]) == 64
        assert said["raw"] == "false"
    back = CliRunner().invoke(cli.app, ["decode", str(tmp_path / "out"), "-o", str(tmp_path / "back"), *CPU])
    assert back.exit_code == 0, back.output
    expected = demo.decode(encoder.encode(pictures["a.png"]), height=64, width=48)[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "back" / "a.png")), np.asarray(expected))


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", **options)
    return buffer.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, value in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))


def test_tars_as_webdataset_has_them(tmp_path: Path, encoder: Encoder) -> None:
    pictures = [picture(), picture(32, 32)]
    members = {"000/a.txt": b"a caption", "000/a.png": png(pictures[0]), "000/b.png": png(pictures[1]), "x.json": b"{}"}
    tar_of(tmp_path / "shard.tar", members)
    assert encode(tmp_path / "shard.tar", "-o", tmp_path / "out").exit_code == 0
    assert files(tmp_path / "out") == {"000/a.safetensors", "000/b.safetensors", "job.json"}
    for name, image in zip("ab", pictures, strict=True):
        assert torch.equal(latents(tmp_path / "out" / "000" / f"{name}.safetensors"), encoder.encode(image))
        assert metadata(tmp_path / "out" / "000" / f"{name}.safetensors")["row"] == str("ab".index(name))


@pytest.mark.parametrize("kind", ["struct", "bytes", "named"])
def test_parquet(tmp_path: Path, encoder: Encoder, kind: str) -> None:
    pictures = [picture(), picture(32, 32), picture(64, 64)]
    if kind == "struct":  # as Hugging Face's datasets have it
        table = pa.table({"image": [{"bytes": png(one), "path": f"{i}.png"} for i, one in enumerate(pictures)]})
        names = ["0", "1", "2"]
    else:
        columns: dict[str, Any] = {"jpg": [png(one) for one in pictures]}
        names = ["set_0000", "set_0001", "set_0002"]
        if kind == "named":
            columns["__key__"], names = ["x", "y", "z"], ["x", "y", "z"]
        table = pa.table(columns)
    pq.write_table(table, tmp_path / "set.parquet", row_group_size=2)
    result = encode(tmp_path / "set.parquet", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for name, image in zip(names, pictures, strict=True):
        assert torch.equal(latents(tmp_path / "out" / f"{name}.safetensors"), encoder.encode(image))


# -- what a picture becomes before it is encoded -------------------------------------------------------------------


def test_a_photograph_is_turned_upright(tmp_path: Path, encoder: Encoder) -> None:
    image = picture(64, 48)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is stored lies on its side
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert encode(tmp_path / "a.png", "-o", tmp_path / "out").exit_code == 0
    said = metadata(tmp_path / "out" / "a.safetensors")
    assert (said["height"], said["width"]) == ("64", "48")
    assert torch.equal(latents(tmp_path / "out" / "a.safetensors"), encoder.encode(image))


_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = _SRGB.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
"""sRGB with red and blue exchanged."""


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("profile", [None, "a profile"])
def test_one_transparent_colour_is_transparency(tmp_path: Path, mode: str, profile: str | None) -> None:
    """Applying a profile changes that colour, and would forget that it is transparent."""
    image = Image.new(mode, (32, 32), "white")
    image.paste("black", (0, 0, 16, 16))
    said = {} if profile is None else {"icc_profile": _SRGB if mode == "RGB" else _grey_profile()}
    image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0, **said)
    assert encode(tmp_path / "a.png", "-o", tmp_path / "out").exit_code == 6
    assert "transparent pixels, and latents hold none" in failures(tmp_path / "out")[0]["message"]


def _grey_profile() -> bytes:
    """A profile of one curve, written by hand, since Pillow makes none: gamma 1, D50."""
    curve = b"curv" + bytes(8)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"text" + bytes(4) + b"none" + bytes(4)
    description = b"desc" + bytes(4) + struct.pack(">I", 2) + b"g" + bytes(80) + bytes(3)
    tags, blob, start = b"", b"", 128 + 4 + 4 * 12
    for name, value in ((b"kTRC", curve), (b"wtpt", white), (b"cprt", text), (b"desc", description)):
        tags += name + struct.pack(">II", start + len(blob), len(value))
        blob += value + bytes(-len(value) % 4)
    body = struct.pack(">I", 4) + tags + blob
    head = struct.pack(
        ">I4sI4s4s4s12s4s4sI",
        128 + len(body),
        bytes(4),
        0x02400000,
        b"mntr",
        b"GRAY",
        b"XYZ ",
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0),
        b"acsp",
        bytes(4),
        0,
    )
    return head + bytes(24) + struct.pack(">3i", 63190, 65536, 54061) + bytes(128 - len(head) - 36) + body


@pytest.mark.parametrize("suffix", ["jpg", "tif", "gif", "ppm"])
def test_every_kind_of_file(tmp_path: Path, encoder: Encoder, suffix: str) -> None:
    picture().save(tmp_path / f"a.{suffix}")
    assert encode(tmp_path / f"a.{suffix}", "-o", tmp_path / "out").exit_code == 0
    expected = encoder.encode(Image.open(tmp_path / f"a.{suffix}").convert("RGB"))
    assert torch.equal(latents(tmp_path / "out" / "a.safetensors"), expected)


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_sixteen_bits_are_refused(tmp_path: Path, suffix: str) -> None:
    values = RNG.integers(0, 2**16, (32, 32, 3), dtype=np.uint16)
    if suffix == "ppm":
        (tmp_path / "a.ppm").write_bytes(b"P6 32 32 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values[..., 0]).save(tmp_path / f"a.{suffix}")
    assert encode(tmp_path / f"a.{suffix}", "-o", tmp_path / "out").exit_code == 6
    assert "more than 8 bits for each value" in failures(tmp_path / "out")[0]["message"]


def test_a_colour_profile_is_applied(tmp_path: Path, encoder: Encoder) -> None:
    """A profile whose red and blue are exchanged makes blue of what is stored as red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image = picture()
    image.save(tmp_path / "same.png", icc_profile=srgb.tobytes())
    image.save(tmp_path / "swapped.png", icc_profile=SWAPPED)
    image.save(tmp_path / "other.png", icc_profile=profile.tobytes())
    names = ("same", "swapped", "other")
    result = encode(*(tmp_path / f"{name}.png" for name in names), "-o", tmp_path / "out")
    assert result.exit_code == 6
    same, swapped = (latents(tmp_path / "out" / f"{name}.safetensors") for name in names[:2])
    assert torch.allclose(same, encoder.encode(image), atol=0.05), "sRGB to sRGB changes next to nothing"
    assert torch.allclose(swapped, encoder.encode(np.asarray(image)[..., ::-1].copy()), atol=0.05)
    assert not torch.allclose(swapped, encoder.encode(image), atol=0.05), "or this shows nothing"
    assert "colour profile that cannot be applied" in failures(tmp_path / "out")[0]["message"]


def test_transparency_is_refused_or_put_on_a_background(tmp_path: Path, encoder: Encoder) -> None:
    image = picture()
    alpha = Image.fromarray(RNG.integers(0, 256, (64, 48), dtype=np.uint8))
    image.putalpha(alpha)
    image.save(tmp_path / "clear.png")
    assert encode(tmp_path / "clear.png", "-o", tmp_path / "out").exit_code == 6
    assert "transparent pixels, and latents hold none; a background" in failures(tmp_path / "out")[0]["message"]
    assert encode(tmp_path / "clear.png", "-o", tmp_path / "out", "--background", "#ff8000").exit_code == 0
    behind = Image.new("RGBA", image.size, "#ff8000")
    expected = encoder.encode(Image.alpha_composite(behind, image).convert("RGB"))
    assert torch.equal(latents(tmp_path / "out" / "clear.safetensors"), expected)


def test_sizes_that_do_not_fit(tmp_path: Path, encoder: Encoder) -> None:
    image = picture(70, 50)
    image.save(tmp_path / "a.png")
    assert encode(tmp_path / "a.png", "-o", tmp_path / "no").exit_code == 6
    said = failures(tmp_path / "no")[0]["message"]
    assert "size: got 70x50 (height x width), expected multiples of 16: the nearest are 64x48 or 80x64" in said
    expected = {"--crop": image.crop((1, 3, 49, 67)), "--resize": image.resize((48, 64), Image.Resampling.LANCZOS)}
    for option, fitted in expected.items():
        assert encode(tmp_path / "a.png", "-o", tmp_path / option, option).exit_code == 0
        assert torch.equal(latents(tmp_path / option / "a.safetensors"), encoder.encode(fitted))
        said = metadata(tmp_path / option / "a.safetensors")
        assert (said["picture_height"], said["picture_width"], said["height"]) == ("70", "50", "64")
    told = encode(tmp_path / "a.png", "-o", tmp_path / "no", "--crop", "--buckets", "64")
    assert told.exception is not None
    assert "--crop and --buckets: got 2 of them" in str(told.exception)


def test_unpacked_latents_and_a_sample(tmp_path: Path, encoder: Encoder) -> None:
    image = picture(72, 40)
    image.save(tmp_path / "a.png")
    assert encode(tmp_path / "a.png", "-o", tmp_path / "out", "--unpacked").exit_code == 0
    assert torch.equal(latents(tmp_path / "out" / "a.safetensors"), encoder.encode(image, packed=False))
    image.save(tmp_path / "b.png")  # the same pixels under another name
    for out, seed in (("one", "5"), ("two", "5"), ("other", "6")):
        both = (tmp_path / "a.png", tmp_path / "b.png")
        assert encode(*both, "-o", tmp_path / out, "--unpacked", "--sample", seed).exit_code == 0
    drawn = [latents(tmp_path / out / "a.safetensors") for out in ("one", "two", "other", "out")]
    drawn.append(latents(tmp_path / "one" / "b.safetensors"))
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0], other) for other in drawn[2:])
    said = metadata(tmp_path / "one" / "a.safetensors")
    assert (said["seed"], said["checkpoint"], said["dtype"]) == ("5", "demo", "float32")
    assert "seed" not in metadata(tmp_path / "out" / "a.safetensors")
    # By the seed and the name alone, on the CPU, whatever the device.
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"5:a").digest()[:8], "big") >> 1)
    assert torch.equal(drawn[0], encoder.encode(image, packed=False, sample=generator))


# -- buckets, and sd-scripts' cache ----------------------------------------------------------------------------------


def test_buckets_are_those_of_sd_scripts() -> None:
    """Written out by hand from `make_bucket_resolutions` with its defaults but FLUX's longest side of 2048."""
    sizes = bucket_sizes(Buckets(64, 1024 * 1024))
    assert (1024, 1024) in sizes
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024 * 1024 and min(h, w) >= 256 for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    by_width = {w: h for h, w in sizes if w < 1024}
    assert by_width == {w: min(2048, 1024 * 1024 // w // 64 * 64) for w in range(256, 1024, 64)}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 400), Fit((448, 597), (448, 576))),
        ((600, 400), Fit((640, 427), (640, 384))),
        ((1000, 1000), Fit((512, 512), (512, 512))),
    ],
)
def test_the_nearest_bucket(size: tuple[int, int], expected: Fit) -> None:
    """By hand, for 512x512 pixels in steps of 64."""
    assert fit(size, 16, "buckets", Buckets(64, 512 * 512)) == expected


@given(
    size=st.tuples(st.integers(17, 5000), st.integers(17, 5000)),
    how=st.sampled_from(["resize", "crop", "buckets"]),
    step=st.sampled_from([16, 32, 64]),
)
def test_what_is_made_to_fit_fits(size: tuple[int, int], how: str, step: int) -> None:
    found = fit(size, 16, how, Buckets(step, 512 * 512))
    assert found.size[0] % 16 == found.size[1] % 16 == 0
    assert min(found.size) >= 16
    assert all(kept <= whole for kept, whole in zip(found.size, found.resized, strict=True))
    if how == "buckets":
        assert found.size in bucket_sizes(Buckets(step, 512 * 512))
        assert min(whole - kept for kept, whole in zip(found.size, found.resized, strict=True)) <= 1
    elif how == "crop":
        assert found.resized == size
    else:
        assert found.resized == found.size


@pytest.mark.parametrize("size", [(15, 64), (64, 8), (1, 1)])
@pytest.mark.parametrize("how", ["refuse", "resize", "crop"])
def test_what_is_smaller_than_a_patch_cannot_be_made_to_fit(size: tuple[int, int], how: str) -> None:
    with pytest.raises(InvalidImagesError, match="it is too small"):
        fit(size, 16, how, None)


def test_the_cache_of_sd_scripts(tmp_path: Path, encoder: Encoder) -> None:
    """Its names, keys and values, as its source has them; `fluxvae decode` reads it as it reads sd-scripts' own."""
    image = Image.fromarray(data.astronaut()[:300, :400])
    image.save(tmp_path / "cat.png")
    arguments = ("-o", tmp_path / "out", "--buckets", "64", "--bucket-area", "262144", "--format", "kohya")
    result = encode(tmp_path / "cat.png", *arguments)
    assert result.exit_code == 0, result.output
    (name,) = files(tmp_path / "out") - {"job.json"}
    assert name == "cat_0400x0300_flux.npz"
    found = Fit((448, 597), (448, 576))  # by hand: the nearest of the buckets
    height, width = found.size
    held = np.load(tmp_path / "out" / name)
    end = f"_{height // 8}x{width // 8}"
    assert set(held.files) == {f"latents{end}", f"original_size{end}", f"crop_ltrb{end}"}
    assert held[f"original_size{end}"].tolist() == [400, 300]
    assert held[f"crop_ltrb{end}"].tolist() == [
        0,
        8,
        576,
        440,
    ]
    resized = image.resize(found.resized[::-1], Image.Resampling.LANCZOS)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    expected = encoder.encode(resized.crop((left, top, left + width, top + height)), packed=False)
    assert held[f"latents{end}"].dtype == np.float32
    assert np.array_equal(held[f"latents{end}"], expected[0].numpy())
    back = CliRunner().invoke(cli.app, ["decode", str(tmp_path / "out"), "-o", str(tmp_path / "back"), *CPU])
    assert back.exit_code == 0, back.output


MUSUBI = {  # the endings and the architectures of musubi-tuner's dataset/architectures.py
    "musubi-flux2-dev": ("f2d", "flux_2_dev", ""),
    "musubi-flux2-klein-4b": ("f2k4b", "flux_2_klein_4b", ""),
    "musubi-flux2-klein-9b": ("f2k9b", "flux_2_klein_9b", ""),
    "musubi-z-image": ("zi", "z_image", "1x"),
}


@pytest.mark.parametrize("name", MUSUBI)
def test_the_caches_of_musubi_tuner(tmp_path: Path, encoder: Encoder, name: str) -> None:
    """Names, keys, metadata and values as its source has them; `fluxvae decode` reads them back."""
    end, architecture, frames = MUSUBI[name]
    checkpoint = "demo"
    if name != "musubi-z-image":
        checkpoint = str(tmp_path / "flux2")
        flux2_vae().save_pretrained(checkpoint)
    image = picture(48, 80)
    image.save(tmp_path / "cat.png")
    common = ("--checkpoint", checkpoint)
    result = encode(tmp_path / "cat.png", "-o", tmp_path / "out", "--format", name, *common)
    assert result.exit_code == 0, result.output
    (written,) = files(tmp_path / "out") - {"job.json"}
    assert written == f"cat_0080x0048_{end}.safetensors"
    own = encoder if checkpoint == "demo" else Encoder.from_pretrained(checkpoint, device="cpu")
    expected = own.encode(image, packed=False, raw=name == "musubi-z-image")[0]
    with safe_open(tmp_path / "out" / written, "pt") as held:
        (key,) = held.keys()
        assert key == f"latents_{frames}{expected.shape[1]}x{expected.shape[2]}_float32"
        assert torch.equal(held.get_tensor(key), expected)
        assert held.metadata() == {
            "architecture": architecture, "width": "80", "height": "48", "format_version": "1.0.1"
        }  # fmt: skip
    arguments = ["decode", str(tmp_path / "out"), "-o", str(tmp_path / "back"), *common, "--device", "cpu"]
    back = CliRunner().invoke(cli.app, arguments)
    assert back.exit_code == 0, back.output
    (decoded,) = files(tmp_path / "back") - {"job.json"}
    assert Image.open(tmp_path / "back" / decoded).size == (80, 48)


def test_a_checkpoint_that_cannot_make_it(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    flux2_vae().save_pretrained(tmp_path / "flux2")
    tiny_vae().save_pretrained(tmp_path / "tiny")
    job = {"inputs": (str(tmp_path / "a.png"),), "out": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(InvalidOptionError, match="not FLUX.1's"):
        encode_files(EncodeJob(**job, checkpoint=str(tmp_path / "flux2"), format="kohya"))
    with pytest.raises(InvalidOptionError, match="seed: got one for an AutoencoderTiny"):
        encode_files(EncodeJob(**job, checkpoint=str(tmp_path / "tiny"), seed=1))
    with pytest.raises(InvalidOptionError, match="steps of 24 pixels, expected a multiple of 16"):
        encode_files(EncodeJob(**job, sizes="buckets", bucket=24))
    report = encode_files(EncodeJob(**job, checkpoint=str(tmp_path / "flux2")))
    assert report.encoded == 1
    expected = Encoder.from_pretrained(tmp_path / "flux2", device="cpu").encode(Image.open(tmp_path / "a.png"))
    assert torch.equal(latents(tmp_path / "out" / "a.safetensors"), expected)
    preview = encode_files(EncodeJob(**job | {"out": str(tmp_path / "previews")}, checkpoint=str(tmp_path / "tiny")))
    assert preview.approximate
    assert "approximate" in metadata(tmp_path / "previews" / "a.safetensors")


# -- what is wrong with pictures -----------------------------------------------------------------------------------


def bad_pictures(folder: Path) -> dict[str, str]:
    """Write pictures of every kind that is refused. Return a part of what is said of each."""
    folder.mkdir(parents=True)
    whole = png(picture())
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "header.png").write_bytes(whole[:20])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    picture().convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(RNG.integers(0, 65536, (64, 48), dtype=np.uint16)).save(folder / "grey16.png")
    (folder / "rgb16.png").write_bytes(rgb16())
    frames = [picture() for _ in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tiff", save_all=True, append_images=frames[1:])
    picture(1, 1).save(folder / "tiny.png")
    (folder / "vast.png").write_bytes(claiming(whole, 100_000, 100_000))
    (folder / "large.png").write_bytes(claiming(whole, 12_000, 12_000))
    return {
        "truncated.png": "truncated", "header.png": "cannot be read as a picture",
        "empty.png": "cannot be read as a picture", "text.jpg": "cannot be read as a picture",
        "cmyk.jpg": "is in mode CMYK", "grey16.png": "more than 8 bits", "rgb16.png": "more than 8 bits",
        "moving.gif": "is an animation, or has several pages: 3", "moving.webp": "is an animation",
        "pages.tiff": "has several pages: 3", "tiny.png": "it is too small",
        "vast.png": "more pixels than Pillow opens", "large.png": "more than the 100000000 that one picture may have",
    }  # fmt: skip


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def rgb16() -> bytes:
    """A PNG with 16 bits for each of red, green and blue, which Pillow does not write."""
    rows = b"".join(b"\0" + RNG.integers(0, 256, 48 * 6, dtype=np.uint8).tobytes() for _ in range(64))
    header = struct.pack(">IIBBBBB", 48, 64, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def claiming(whole: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size than it holds."""
    return whole[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + whole[24:29]) + whole[33:]


def test_bad_pictures_get_a_line_each_and_the_rest_is_done(tmp_path: Path, encoder: Encoder) -> None:
    said = bad_pictures(tmp_path / "in")
    good = picture()
    good.save(tmp_path / "in" / "good.png")
    result = encode(tmp_path / "in", "-o", tmp_path / "out", "--max-pixels", "100000000", "--json")
    assert result.exit_code == 6, result.output
    told = json.loads(result.stdout)
    assert (told["encoded"], told["failed"]) == (1, len(said))
    assert torch.equal(latents(tmp_path / "out" / "good.safetensors"), encoder.encode(good))
    lines = {Path(line["source"]).name: line for line in failures(tmp_path / "out")}
    assert lines.keys() == said.keys()
    for name, part in said.items():
        assert part in lines[name]["message"], (name, lines[name]["message"])
        assert lines[name]["error"] == "InvalidImagesError"


def test_a_tar_that_is_damaged_and_one_that_is_packed(tmp_path: Path) -> None:
    tar_of(tmp_path / "in.tar", {"a.png": png(picture()), "b.png": png(picture())[:-500], "c.txt": b""})
    (tmp_path / "half.tar").write_bytes((tmp_path / "in.tar").read_bytes()[:2000])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "in.tar", "x.png")
    tar_of(tmp_path / "none.tar", {"c.txt": b"words"})
    result = encode(*(tmp_path / f"{name}.tar" for name in ("in", "half", "packed", "none")), "-o", tmp_path / "out")
    assert result.exit_code == 6
    assert "a.safetensors" in files(tmp_path / "out")
    told = {Path(line["source"]).name: line["message"] for line in failures(tmp_path / "out")}
    assert len(failures(tmp_path / "out")) == 4, told
    tar = "cannot be read as a tar"
    for name, part in {
        "in": "b: cannot be read as a picture",
        "half": tar,
        "packed": tar,
        "none": "no pictures",
    }.items():
        assert part in told[f"{name}.tar"], told


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    names = ("../../escape.png", "/abs.png", "ok.png")
    tar_of(tmp_path / "in.tar", {name: png(picture()) for name in names})
    assert encode(tmp_path / "in.tar", "-o", tmp_path / "out").exit_code == 6
    assert files(tmp_path / "out") == {"ok.safetensors", "job.json", "failures.jsonl"}
    assert all("name: got" in line["message"] for line in failures(tmp_path / "out"))
    assert sorted(line["row"] for line in failures(tmp_path / "out")) == [0, 1]


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    for suffix in ("png", "bmp"):
        picture().save(tmp_path / f"a.{suffix}")
    assert encode(tmp_path, "-o", tmp_path / "out").exit_code == 6
    assert "a.safetensors is also the output of" in failures(tmp_path / "out")[0]["message"]


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    """To open one would be to wait until someone writes to it."""
    for name in ("a.png", "b.tar", "c.parquet"):
        os.mkfifo(tmp_path / name)
    assert encode(*(tmp_path / name for name in ("a.png", "b.tar", "c.parquet")), "-o", tmp_path / "out").exit_code == 6
    assert all("is a pipe, a device or a folder" in line["message"] for line in failures(tmp_path / "out"))
    assert len(failures(tmp_path / "out")) == 3


def test_the_same_bytes_in_many_rows_are_in_memory_once(tmp_path: Path) -> None:
    """A small file of one picture in 4,000 rows; unpacked to objects it would be 4 GB."""
    content = b"\x89PNG" + bytes(2**20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array([content]))
    pq.write_table(pa.table({"jpg": column}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    before = resident()
    album = open_album(str(tmp_path / "a.parquet"))
    assert len(list(album.members())) == 4000
    assert album.read(3999).getbuffer().nbytes == len(content)
    assert resident() - before < 200 * 2**20


def test_what_pillow_opens_is_what_is_allowed() -> None:
    assert MAX_PICTURE_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_photographs_are_refused_for_trainers_caches(tmp_path: Path, orientation: int) -> None:
    """sd-scripts and musubi-tuner pass over the orientation, and would look for another size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a.png", exif=exif)
    assert encode(tmp_path / "a.png", "-o", tmp_path / "out", "--format", "kohya").exit_code == 6
    assert f"turned by its EXIF (orientation {orientation})" in failures(tmp_path / "out")[0]["message"]


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two threads are inside `warnings.catch_warnings`, the filters of the first may stay for good."""
    entered: set[threading.Thread] = set()

    class Watched(warnings.catch_warnings):  # type: ignore[type-arg]
        def __enter__(self) -> Any:
            entered.add(threading.current_thread())
            return super().__enter__()

    for index in range(12):
        picture(32, 32).save(tmp_path / f"{index}.png")
    monkeypatch.setattr(warnings, "catch_warnings", Watched)
    before = list(warnings.filters)
    encode_files(EncodeJob(inputs=(str(tmp_path),), out=str(tmp_path / "out"), device="cpu"))
    assert warnings.filters == before
    assert entered == {threading.current_thread()}


# -- jobs ------------------------------------------------------------------------------------------------------------


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    assert encode(tmp_path / "a.png", "-o", tmp_path / "out").exit_code == 0
    picture().save(tmp_path / "b.png")
    both = (tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "out")
    assert "--resume encodes only what is missing" in str(encode(*both).exception)
    assert "begun with sizes refuse, and this is crop" in str(encode(*both, "--resume", "--crop").exception)
    told = json.loads(encode(*both, "--resume", "--json").stdout)
    assert (told["present"], told["encoded"]) == (1, 1)


def test_the_checkpoints_hash_is_in_every_file(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    encode(tmp_path / "a.png", "-o", tmp_path / "out")
    (path,) = weights_files("demo")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert metadata(tmp_path / "out" / "a.safetensors")["checkpoint_sha256"] == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": ()}, "inputs: got none"),
        ({"format": "pt"}, "format: got 'pt'"),
        ({"sizes": "stretch"}, "sizes: got 'stretch'"),
        ({"bucket": 0}, "bucket: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"max_pixels": 0}, "max_pixels: got 0"),
        ({"max_pixels": MAX_PICTURE_PIXELS + 1}, "max_pixels: got 178956971, expected at most 178956970"),
        ({"background": "nice"}, "background: got 'nice'"),
        ({"sizes": "buckets", "bucket": 4096}, "which no size fits"),
        ({"format": "kohya", "packed": False}, "never packs"),
        ({"memory_limit": "much"}, "memory_limit: got 'much'"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        EncodeJob(**{"inputs": ("a.png",), "out": "out"} | options)


def test_flux2_latents_are_packed_row_by_row(tmp_path: Path) -> None:
    """As `Decoder` reads them without ids."""
    vae = flux2_vae()
    encoder, decoder = Encoder(vae), Decoder(vae)
    image = picture(48, 80)
    packed = encoder.encode(image)
    assert not torch.equal(packed, pack_latents(encoder.encode(image, packed=False, raw=True)))
    decoded = decoder.decode_raw(packed, height=48, width=80)
    assert torch.allclose(decoded, decoder.decode_raw(encoder.encode(image, packed=False)), atol=1e-5)
