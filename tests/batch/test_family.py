"""FLUX.2's latents (position ids, raw) and previews through a job: the library's images, and files that say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, InvalidOptionError
from fluxvae.engine.preview import ApproximateWarning

from .jobs import decode, failures, files, folder_of, image, save

GH, GW = 3, 4
SIZE = {"height": 16 * GH, "width": 16 * GW}


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux2")
    flux2_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(flux2: Path) -> Decoder:
    return Decoder.from_pretrained(flux2, device="cpu")


def shuffled(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed latents (B, N, 128) and ids (B, N, 4), whose tokens are in another order in every row."""
    generator = torch.Generator().manual_seed(3)
    cells = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(GH), torch.arange(GW), torch.zeros(1).long())
    ids = torch.stack([cells[torch.randperm(GH * GW, generator=generator)] for _ in range(count)])
    return torch.randn(count, GH * GW, 128, generator=generator), ids


def expected(decoder: Decoder, tensor: torch.Tensor, **options: Any) -> np.ndarray:
    return decoder.decode(tensor, output_type="uint8", **options)[0]


Held = dict[str, torch.Tensor]


def _safetensors(path: Path, held: Held, size: bool) -> None:
    save_file(held, path, {key: str(value) for key, value in SIZE.items()} if size else None)


def _npz(path: Path, held: Held, size: bool) -> None:
    np.savez(path, **{key: value.numpy() for key, value in held.items()}, **(SIZE if size else {}))


def _pt(path: Path, held: Held, size: bool) -> None:
    torch.save(held | (SIZE if size else {}), path)


def _parquet(path: Path, held: Held, size: bool) -> None:
    rows = len(held["latents"])
    columns = {key: value.tolist() for key, value in held.items()}
    columns |= {key: [value] * rows for key, value in SIZE.items()} if size else {}
    pq.write_table(pa.table(columns), path)


KINDS: dict[str, Callable[[Path, Held, bool], None]] = {
    "safetensors": _safetensors,
    "npz": _npz,
    "pt": _pt,
    "parquet": _parquet,
}


@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_position_ids(kind: str, size: bool, tmp_path: Path, flux2: Path, decoder: Decoder) -> None:
    """The rows of a batch may have their tokens in different orders. The ids also tell the size."""
    latents, ids = shuffled(3)
    KINDS[kind](tmp_path / f"set.{kind}", {"latents": latents, "latent_ids": ids}, size)
    done = decode(tmp_path / f"set.{kind}", "-o", tmp_path / "out", "--checkpoint", flux2)
    assert done.exit_code == 0, done.output
    for row in range(3):
        at = slice(row, row + 1)
        wanted = expected(decoder, latents[at], latent_ids=ids[at])
        assert np.array_equal(image(tmp_path / f"out/set_000{row}.png"), wanted)
        assert not np.array_equal(expected(decoder, latents[at], **SIZE), wanted), "the ids change nothing here"


def test_ids_for_all_rows_and_ids_that_are_wrong(tmp_path: Path, flux2: Path, decoder: Decoder) -> None:
    latents, ids = shuffled(2)
    (tmp_path / "in").mkdir()
    _npz(tmp_path / "in/all.npz", {"latents": latents, "latent_ids": ids[0]}, True)
    _npz(tmp_path / "in/few.npz", {"latents": latents, "latent_ids": ids[:, :, :3]}, True)
    _npz(tmp_path / "in/rows.npz", {"latents": latents, "latent_ids": torch.cat([ids, ids])}, True)
    _npz(tmp_path / "in/twice.npz", {"latents": latents[:1], "latent_ids": torch.zeros_like(ids[:1])}, True)
    assert decode(tmp_path / "in", "-o", tmp_path / "out", "--checkpoint", flux2).exit_code == 6
    wanted = expected(decoder, latents[1:], latent_ids=ids[:1])
    assert np.array_equal(image(tmp_path / "out/all_0001.png"), wanted)
    told = {Path(line["source"]).name: line["message"] for line in failures(tmp_path / "out")}
    assert told.keys() == {"few.npz", "rows.npz", "twice.npz"}
    assert "latent_ids: got shape" in told["few.npz"]
    assert "latent_ids: got shape (4, 12, 4) for 2 latents" in told["rows.npz"]
    assert "latent_ids" in told["twice.npz"]
    assert files(tmp_path / "out") == {"all_0000.png", "all_0001.png", "failures.jsonl", "job.json"}


def test_raw_is_said_in_the_file_or_by_an_option(tmp_path: Path, flux2: Path, decoder: Decoder) -> None:
    """One job may hold raw and normalised latents of the same shape. Where a file says neither, it is not guessed."""
    latents = torch.randn(1, 32, 2 * GH, 2 * GW, generator=torch.Generator().manual_seed(4))
    (tmp_path / "in").mkdir()
    save_file({"latents": latents}, tmp_path / "in/raw.safetensors", {"raw": "true"})
    np.savez(tmp_path / "in/normal.npz", latents=latents.numpy(), raw=False)
    torch.save({"latents": latents}, tmp_path / "in/silent.pt")
    save_file({"latents": latents}, tmp_path / "in/words.safetensors", {"raw": "perhaps"})
    raw, normal = (expected(decoder, latents, raw=raw) for raw in (True, False))
    assert not np.array_equal(raw, normal)
    out = tmp_path / "out"
    assert decode(tmp_path / "in", "-o", out, "--checkpoint", flux2).exit_code == 6
    told = {Path(line["source"]).name: line["message"] for line in failures(out)}
    assert told.keys() == {"silent.pt", "words.safetensors"}
    assert "pass --raw or --no-raw" in told["silent.pt"]
    assert "raw: got 'perhaps', expected true or false" in told["words.safetensors"]
    assert np.array_equal(image(out / "raw.png"), raw)
    assert np.array_equal(image(out / "normal.png"), normal)
    for option, wanted in (("--raw", raw), ("--no-raw", normal)):
        out = tmp_path / option
        assert decode(tmp_path / "in", "-o", out, "--checkpoint", flux2, option).exit_code == 0
        for name in ("raw", "normal", "silent", "words"):
            assert np.array_equal(image(out / f"{name}.png"), wanted), (option, name)
    other = decode(tmp_path / "in", "-o", tmp_path / "--raw", "--checkpoint", flux2, "--resume")
    assert "was begun with raw True, and this is None" in str(other.exception)


def test_a_feature_order_is_said_in_the_file_or_by_an_option(tmp_path: Path, flux2: Path, decoder: Decoder) -> None:
    """Ideogram 4's and FLUX.2's latents, alike but for what is said of them, in one job."""
    latents = torch.randn(1, GH * GW, 128, generator=torch.Generator().manual_seed(4))
    own, text = {"feature_order": "row_column_channel"}, {key: str(value) for key, value in SIZE.items()}
    (tmp_path / "in").mkdir()
    save_file({"latents": latents}, tmp_path / "in/metadata.safetensors", {**text, **own})
    torch.save({"latents": latents, **SIZE, **own}, tmp_path / "in/key.pt")
    columns = {key: [value] for key, value in {"latents": latents[0].tolist(), **SIZE, **own}.items()}
    pq.write_table(pa.table(columns), tmp_path / "in/column.parquet")
    save_file({"latents": latents}, tmp_path / "in/silent.safetensors", text)
    save_file({"latents": latents}, tmp_path / "in/words.safetensors", {**text, "feature_order": "rows"})
    ideogram, other = (expected(decoder, latents, **SIZE, **said) for said in (own, {}))
    assert not np.array_equal(ideogram, other)
    out = tmp_path / "out"
    assert decode(tmp_path / "in", "-o", out, "--checkpoint", flux2).exit_code == 6
    [failure] = failures(out)
    assert "feature_order: got 'rows', expected 'channel_row_column'" in failure["message"]
    for name, wanted in (("metadata", ideogram), ("key", ideogram), ("column", ideogram), ("silent", other)):
        assert np.array_equal(image(out / f"{name}.png"), wanted), name
    out = tmp_path / "option"
    assert (
        decode(tmp_path / "in", "-o", out, "--checkpoint", flux2, "--feature-order", own["feature_order"]).exit_code
        == 0
    )
    assert all(np.array_equal(image(out / f"{name}.png"), ideogram) for name in ("metadata", "silent", "words"))
    again = decode(tmp_path / "in", "-o", out, "--checkpoint", flux2, "--resume")
    assert "was begun with feature_order row_column_channel, and this is None" in str(again.exception)


def test_a_feature_order_is_refused_where_there_is_none(tmp_path: Path, flux2: Path) -> None:
    said = {"feature_order": "row_column_channel", **{key: str(value) for key, value in SIZE.items()}}
    save_file({"latents": torch.randn(1, GH * GW, 64)}, tmp_path / "cat.safetensors", said)
    assert decode(tmp_path / "cat.safetensors", "-o", tmp_path / "out").exit_code == 6
    assert "feature_order: got 'row_column_channel' for a checkpoint" in failures(tmp_path / "out")[0]["message"]
    for option, checkpoint in (("rows", flux2), ("row_column_channel", "demo")):
        done = decode(
            tmp_path / "cat.safetensors", "-o", tmp_path / "no", "--checkpoint", checkpoint, "--feature-order", option
        )
        assert isinstance(done.exception, InvalidOptionError)
        assert f"feature_order: got '{option}'" in str(done.exception)


def test_ids_and_raw_of_other_models_are_refused(tmp_path: Path) -> None:
    save_file(
        {"latents": torch.randn(1, GH * GW, 64), "latent_ids": shuffled(1)[1]},
        tmp_path / "ids.safetensors",
        {key: str(value) for key, value in SIZE.items()},
    )
    assert decode(tmp_path / "ids.safetensors", "-o", tmp_path / "out").exit_code == 6
    assert "FLUX.2's latents only" in failures(tmp_path / "out")[0]["message"]


@pytest.mark.parametrize("format", ["png", "webp", "safetensors"])
@pytest.mark.filterwarnings("error::fluxvae.engine.preview.ApproximateWarning")
def test_previews_say_so(format: str, tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "taef1")
    made = folder_of(tmp_path / "in", 3)
    out = tmp_path / "out"
    done = decode(tmp_path / "in", "-o", out, "--checkpoint", tmp_path / "taef1", "--format", format)
    assert done.exit_code == 0, done.output
    assert "approximate preview" in done.stderr
    assert json.loads((out / "job.json").read_text())["approximate"] is True
    if format == "safetensors":
        from safetensors import safe_open

        with safe_open(out / "0002.safetensors", "pt") as file:
            said = file.metadata()
    else:
        picture = Image.open(out / f"0002.{format}")
        said = picture.info if format == "png" else json.loads(picture.getexif()[270])
    assert said["approximate"].startswith("approximate preview")
    if format == "png":
        decoder = Decoder.from_pretrained(tmp_path / "taef1", device="cpu")
        with pytest.warns(ApproximateWarning):
            wanted = expected(decoder, made["0002"], height=64, width=64)
        assert np.array_equal(image(out / "0002.png"), wanted)


def test_a_preview_takes_no_raw_latents(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "taef1")
    save(tmp_path / "cat.safetensors", torch.randn(1, 16, 64))
    refused = decode(tmp_path / "cat.safetensors", "-o", tmp_path / "out", "--checkpoint", tmp_path / "taef1", "--raw")
    assert isinstance(refused.exception, InvalidOptionError)
    assert "takes latents as the transformer leaves them" in str(refused.exception)
    assert files(tmp_path / "out") == set()


def test_full_images_do_not_say_they_are_approximate(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 1)
    assert decode(tmp_path / "in", "-o", tmp_path / "out").exit_code == 0
    assert "approximate" not in Image.open(tmp_path / "out/0000.png").info


@pytest.mark.parametrize("kind", ["flux2", "taef1", "taef2"])
def test_dry_runs(kind: str, tmp_path: Path, flux2: Path) -> None:
    """The rate is measured with latents that every checkpoint takes, also a preview's."""
    if kind != "flux2":
        tiny_vae(32 if kind == "taef2" else 16).save_pretrained(tmp_path / kind)
    latents = torch.randn(1, GH * GW, 64 if kind == "taef1" else 128)
    _npz(tmp_path / "cat.npz", {"latents": latents}, True)
    checkpoint = flux2 if kind == "flux2" else tmp_path / kind
    told = json.loads(
        decode(tmp_path / "cat.npz", "-o", tmp_path / "out", "--checkpoint", checkpoint, "--dry-run", "--json").stdout
    )
    assert (told["to_decode"], told["approximate"]) == (1, kind != "flux2")
    assert told["estimated_seconds"] > 0
