"""fluxvae works without what only POSIX or only Linux has, and asks for that in a few places only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fluxvae
from batch.jobs import folder_of
from fluxvae import InvalidLatentsError, system
from fluxvae.batch import Job, decode_files, store
from fluxvae.batch.names import windows_problem
from fluxvae.batch.store import LocalStore
from systems_child import CALLS, LINUX_ONLY, MODULES, SIGNALS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fluxvae"


@pytest.fixture(scope="module")
def demo() -> fluxvae.Decoder:
    return fluxvae.Decoder.from_pretrained("demo", device="cpu")


# -- without them ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="it asks Linux which files are open, to do as Windows would")
def test_all_but_the_server_works_without_posix(tmp_path: Path, demo: fluxvae.Decoder) -> None:
    """See `systems_child` for what is taken away; the bits are those of this process, from which nothing was."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    raw = latents / demo.vae.config.scaling_factor + demo.vae.config.shift_factor
    with fluxvae.install(demo.vae), torch.no_grad():
        decoded = demo.vae.decode(raw).sample
    wanted = {
        "latents": latents,
        "image": demo.decode(latents, output_type="pt"),
        "decoded": decoded,
        "encoded": fluxvae.Encoder.from_pretrained("demo", device="cpu").encode(picture, packed=False),
    }
    save_file(wanted, tmp_path / "wanted.safetensors")
    Image.fromarray(picture).save(tmp_path / "picture.png")
    folder_of(tmp_path / "in", 2)
    words = [sys.executable, "-W", "ignore", Path(__file__).with_name("systems_child.py"), tmp_path]
    environment = {**os.environ, "COLUMNS": "500"}  # so that tables shorten no path
    ran = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), ran.stderr[-6000:]


# -- where they are asked for ----------------------------------------------------------------------------------------

PLACES = {
    "system.py": None,
    "forked.py": {"/proc", "os.fork", "os.kill", "os.WNOHANG", "signal.SIGKILL"},
    "plans.py": {"/dev"},
    "engine/memory/heap.py": {"ctypes.CDLL(None)"},
    "engine/memory/pages.py": {"ctypes.CDLL(None)"},
    "serve/triton/": None,
    "serve/supervisor/": None,
    "serve/model/": None,
}
"""What may ask for which of these names (None: for all). Each has another way; Triton's side needs none."""
BANNED = {
    *(f"import {name}" for name in (*MODULES, "msvcrt", "posix", "winreg")),
    *(f"os.{name}" for name in (*CALLS, "kill", "startfile")),
    *(f"signal.{name}" for name in SIGNALS),
    *("socket.AF_UNIX", "ctypes.CDLL(None)", "ctypes.windll", "select.poll", "select.epoll"),
}


def asked_for(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a module that only some systems have."""
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [f"import {alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"import {node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, (ast.Attribute, ast.Call)):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield from ((node.lineno, at) for at in LINUX_ONLY if f"{node.value}/".startswith(f"{at}/"))
        yield from ((node.lineno, name) for name in names if name in BANNED)


def in_the_systems_encoding(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every call that reads or writes text in the system's encoding, which is not always UTF-8."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [value for value in (*node.args[:2], given.get("mode")) if isinstance(value, ast.Constant)]
        mode = next((str(value.value) for value in modes if set(str(value.value)) <= set("rwaxtb+")), "")
        if name == "open":
            text = "b" not in mode if isinstance(node.func, ast.Name) else bool(mode) and "b" not in mode
        else:
            text = name in ("read_text", "write_text") or "text" in given
        if text and "encoding" not in given:
            yield node.lineno, ast.unparse(node)


def place_of(path: Path) -> str:
    return path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT).as_posix()


@pytest.mark.parametrize("path", sorted([*SOURCE.rglob("*.py"), *(ROOT / "comfyui").rglob("*.py")]), ids=place_of)
def test_each_is_asked_for_in_its_place(path: Path) -> None:
    tree, place = ast.parse(path.read_text(encoding="utf-8")), place_of(path)
    allowed = next((names for start, names in PLACES.items() if place.startswith(start)), set[str]())
    wrong = [f"{place}:{line}: {name}" for line, name in asked_for(tree) if allowed is not None and name not in allowed]
    assert not wrong, "\n".join(wrong) + "\nask for it in fluxvae/system.py, with another way"
    wrong = [f"{place}:{line}: {text}" for line, text in in_the_systems_encoding(tree)]
    assert not wrong, "\n".join(wrong) + "\nname the encoding"


def test_the_places_do_ask_for_what_they_may() -> None:
    for place, names in PLACES.items():
        path = SOURCE / place
        assert path.exists()
        if names is not None:
            assert {name for _, name in asked_for(ast.parse(path.read_text(encoding="utf-8")))} == names, place


@pytest.mark.parametrize(
    "code",
    [
        "import fcntl",
        "from resource import getrusage",
        "import os\ndef f(): return os.preadv(0, [], 0)",
        "from os import sysconf",
        "os.kill(1, 0)",
        "signal.signal(signal.SIGHUP, f)",
        "Path(f'/proc/{pid}/stat')",
        "socket.socket(socket.AF_UNIX)",
        "ctypes.CDLL(None)",
    ],
)
def test_a_name_that_only_some_systems_have_is_found(code: str) -> None:
    assert list(asked_for(ast.parse(code)))


@pytest.mark.parametrize("code", ['"/proc"', "os.getpid()", "'/process'", "signal.SIGINT", "ctypes.CDLL('x.so')"])
def test_a_name_that_all_have_is_not(code: str) -> None:
    assert not list(asked_for(ast.parse(code)))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("p.open('r')", True),
        ("p.read_text()", True),
        ("p.write_text(t, errors='replace')", True),
        ("subprocess.run(w, text=True)", True),
        ("open(p, 'rb')", False),
        ("p.open('ab')", False),
        ("library.open(url)", False),
        ("p.read_text(encoding='utf-8')", False),
    ],
)
def test_text_in_the_systems_encoding_is_found(code: str, found: bool) -> None:
    assert bool(list(in_the_systems_encoding(ast.parse(code)))) == found


# -- names of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a:b", "what?", "x/a|b", "dot.", "folder./x", "space ", "CON", "x/nul", "aux.latents", "Com1", "LPT9.a.b"]
)
def test_names_that_windows_takes_for_something_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert windows_problem(name)
    LocalStore(tmp_path, "aa").check(name)
    monkeypatch.setattr(store, "_WINDOWS", True)
    with pytest.raises(InvalidLatentsError, match="name: got .* Windows"):
        LocalStore(tmp_path, "aa").check(name)


@pytest.mark.parametrize("name", ["a", "a.b/c d", "console", "com", "comma.1", "nullable", "ü_0001"])
def test_names_that_windows_takes(name: str) -> None:
    assert windows_problem(name) is None


def test_names_that_differ_in_case_are_one_file_where_folders_ignore_it(
    tmp_path: Path, demo: fluxvae.Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "in", 1)
    there = tmp_path / "in" / "0000.safetensors"
    for name in ("Cat", "cat", "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")):
        there.with_stem(name).write_bytes(there.read_bytes())
    there.unlink()

    def report(out: str) -> tuple[int, list[str]]:
        made = decode_files(Job(inputs=(str(tmp_path / "in"),), out=str(tmp_path / out)), decoder=demo)
        return made.done, [failure.message for failure in made.failures]

    assert report("all") == (4, [])
    monkeypatch.setattr(store, "names_ignore_case", lambda folder: True)
    done, failures = report("fewer")
    assert done == 2
    assert len(failures) == 2
    assert all("is also the output of" in message for message in failures)


def test_whether_names_ignore_case_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Cat").touch()
    assert not system.names_ignore_case(tmp_path)
    assert not system.names_ignore_case(tmp_path / "not" / "there")
    (tmp_path / "cAT").hardlink_to(tmp_path / "Cat")  # as in a folder that ignores case: one file by both names
    assert system.names_ignore_case(tmp_path)
    (tmp_path / "cAT").unlink()
    (tmp_path / "cAT").touch()
    assert not system.names_ignore_case(tmp_path), "two files"


# -- memory ----------------------------------------------------------------------------------------------------------


def test_half_of_the_memory_is_taken_for_free_where_it_is_not_told_and_plans_say_so(
    demo: fluxvae.Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_by_meminfo", lambda: None)
    found = system.free_memory()
    assert found is not None
    assert found.told_by.startswith("half of the memory built in")
    assert found.told_by in str(demo.plan(64, 64))
