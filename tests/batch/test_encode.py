"""``fluxvae encode``: what it reads, what it makes pictures fit, what it writes, and what it refuses by name."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
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
from fluxvae.batch.fitting import Buckets, bucket_sizes, fit
from fluxvae.checkpoints import weights_files
from fluxvae.errors import InvalidImagesError

from .jobs import CPU, failures, files

RNG = np.random.default_rng(3)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder.from_pretrained("demo", device="cpu")


def encode(*arguments: str | Path) -> Result:
    """Run ``fluxvae encode`` in this process."""
    return CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["encode", *map(str, arguments), *CPU])


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


def test_a_colour_profile_is_applied(tmp_path: Path, encoder: Encoder) -> None:
    """A profile whose red and blue are exchanged makes blue of what is stored as red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    image = picture()
    image.save(tmp_path / "same.png", icc_profile=srgb.tobytes())
    image.save(tmp_path / "other.png", icc_profile=profile.tobytes())
    result = encode(tmp_path / "same.png", tmp_path / "other.png", "-o", tmp_path / "out")
    assert result.exit_code == 6
    same = latents(tmp_path / "out" / "same.safetensors")
    assert torch.allclose(same, encoder.encode(image), atol=0.05), "sRGB to sRGB changes next to nothing"
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
    for out in ("one", "two"):
        assert encode(tmp_path / "a.png", "-o", tmp_path / out, "--unpacked", "--sample", "5").exit_code == 0
    drawn = [latents(tmp_path / out / "a.safetensors") for out in ("one", "two", "out")]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# -- buckets, and sd-scripts' cache ----------------------------------------------------------------------------------


def test_buckets_are_those_of_sd_scripts() -> None:
    """Written out by hand from `make_bucket_resolutions` with its defaults but FLUX's longest side of 2048."""
    sizes = bucket_sizes(Buckets(64, 1024 * 1024))
    assert (1024, 1024) in sizes
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024 * 1024 and min(h, w) >= 256 for h, w in sizes)
    by_width = {w: h for h, w in sizes if w < 1024}
    assert by_width == {w: min(2048, 1024 * 1024 // w // 64 * 64) for w in range(256, 1024, 64)}


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
    arguments = ("-o", tmp_path / "out", "--buckets", "64", "--bucket-area", "65536", "--format", "kohya")
    result = encode(tmp_path / "cat.png", *arguments)
    assert result.exit_code == 0, result.output
    (name,) = files(tmp_path / "out") - {"job.json"}
    assert name == "cat_0400x0300_flux.npz"
    found = fit((300, 400), 8, "buckets", Buckets(64, 65536))
    height, width = found.size
    held = np.load(tmp_path / "out" / name)
    end = f"_{height // 8}x{width // 8}"
    assert set(held.files) == {f"latents{end}", f"original_size{end}", f"crop_ltrb{end}"}
    assert held[f"original_size{end}"].tolist() == [400, 300]
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
    told = [line["message"] for line in failures(tmp_path / "out")]
    assert len(told) == 4, told
    assert sum("truncated" in one for one in told) >= 2
    assert any("holds no pictures" in one for one in told)


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    names = ("../../escape.png", "/abs.png", "ok.png")
    tar_of(tmp_path / "in.tar", {name: png(picture()) for name in names})
    assert encode(tmp_path / "in.tar", "-o", tmp_path / "out").exit_code == 6
    assert files(tmp_path / "out") == {"ok.safetensors", "job.json", "failures.jsonl"}
    assert all("name: got" in line["message"] for line in failures(tmp_path / "out"))


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    for suffix in ("png", "bmp"):
        picture().save(tmp_path / f"a.{suffix}")
    assert encode(tmp_path, "-o", tmp_path / "out").exit_code == 6
    assert "a.safetensors is also the output of" in failures(tmp_path / "out")[0]["message"]


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
