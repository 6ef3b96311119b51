"""What a job does with options, with a folder that is not empty, and with the order of its items."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from fluxvae import Decoder, InvalidOptionError
from fluxvae.batch import Job, decode_files
from fluxvae.batch.folder import lock
from fluxvae.batch.store import open_store

from .jobs import assert_whole, decode, files, folder_of, latents, save


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder)}


def test_batches_and_order_change_no_byte(tmp_path: Path, demo: Decoder) -> None:
    folder_of(tmp_path / "in", 7)
    for index in range(3):
        save(tmp_path / f"in/wide{index}.safetensors", latents(index, 32, 64), 32, 64)
    paths = [str(path) for path in sorted((tmp_path / "in").iterdir())]
    made = []
    for batch, inputs in ((1, paths), (4, paths[::-1]), (3, [*paths[5:], *paths[:5]])):
        out = tmp_path / f"out{batch}"
        report = decode_files(Job(inputs=tuple(inputs), out=str(out), batch=batch), decoder=demo)
        assert report.decoded == 10
        made.append(digests(out))
    assert made[0] == made[1] == made[2]


def test_a_folder_that_holds_images(tmp_path: Path, demo: Decoder) -> None:
    made = folder_of(tmp_path / "in", 2)
    out = tmp_path / "out"
    assert decode(tmp_path / "in", "-o", out).exit_code == 0
    before = digests(out)
    refused = decode(tmp_path / "in", "-o", out)
    assert isinstance(refused.exception, InvalidOptionError)
    assert "already holds 2 of the 2 images; --resume decodes only what is missing" in str(refused.exception)
    assert digests(out) == before
    (out / "0000.png").write_bytes(b"another's")
    told = json.loads(decode(tmp_path / "in", "-o", out, "--resume", "--json").stdout)
    assert (told["present"], told["decoded"]) == (2, 0)
    assert decode(tmp_path / "in", "-o", out, "--overwrite").exit_code == 0
    assert_whole(out, made, demo)
    other = decode(tmp_path / "in", "-o", out, "--resume", "--dtype", "bfloat16")
    assert "was begun with dtype float32, and this is bfloat16" in str(other.exception)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", 3)
    save(tmp_path / "in/bad.safetensors", latents(1), 64, 128)
    shown = decode(tmp_path / "in", "-o", tmp_path / "out", "--dry-run")
    assert shown.exit_code == 6, shown.output
    assert "3 to decode, 0.0 megapixels" in shown.stdout
    assert max(map(len, shown.stdout.split("\n\n")[0].splitlines())) <= 80
    told = json.loads(decode(tmp_path / "in", "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert (told["to_decode"], len(told["failures"])) == (3, 1)
    assert told["estimated_seconds"] > 0
    assert told["sizes"][0]["peak_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_one_job_at_a_time(tmp_path: Path, demo: Decoder) -> None:
    folder_of(tmp_path / "in", 1)
    job = Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "out"))
    with lock(open_store(job.out, "aa")), pytest.raises(InvalidOptionError, match="another job is writing"):
        decode_files(job, decoder=demo)
    assert decode_files(job, decoder=demo).decoded == 1


def test_stopped_before_it_began(tmp_path: Path, demo: Decoder) -> None:
    folder_of(tmp_path / "in", 3)
    stop = threading.Event()
    stop.set()
    report = decode_files(Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "out")), decoder=demo, stop=stop)
    assert (report.decoded, report.left, report.stopped) == (0, 3, True)


def test_latents_are_not_written_over(tmp_path: Path, demo: Decoder) -> None:
    folder_of(tmp_path / "in", 1)
    job = Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / "in"), format="safetensors", existing="overwrite")
    with pytest.raises(InvalidOptionError, match="would be written over latents"):
        decode_files(job, decoder=demo)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing/here", "-o", "out"], "input: nothing at nothing/here; expected a file, a folder or a glob"),
        (["pyproject.toml", "-o", "out"], "input: got pyproject.toml, expected a folder or a file of"),
        (["x.npz", "-o", "out", "--format", "bmp"], "format: got 'bmp', expected one of png"),
        (["x.npz", "-o", "out", "--quality", "5"], "quality: got 5 with format png, which is lossless"),
        (["x.npz", "-o", "out", "--resume", "--overwrite"], "--resume and --overwrite: got both"),
        (["x.npz", "-o", "nosuch://out"], "nosuch://out: cannot be opened by fsspec"),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    refused = decode(*arguments)
    assert isinstance(refused.exception, InvalidOptionError)
    assert message in str(refused.exception)


def test_a_refused_job_leaves_no_folder(tmp_path: Path, demo: Decoder) -> None:
    for out in ("made/for/it", "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(InvalidOptionError, match="nothing at"):
            decode_files(Job(inputs=("nothing/here",), out=str(tmp_path / out)), decoder=demo)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
