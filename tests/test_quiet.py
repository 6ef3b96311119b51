"""Nothing is printed that a user can do nothing about: where all is well, standard error stays empty.

That holds without accelerate too. A user who installs only fluxvae does not have it, and diffusers complains of that
when it loads weights.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fluxvae.demo import DEFAULT_LATENTS, read_latents

README = (Path(__file__).parent.parent / "README.md").read_text()
FIRST_SNIPPET = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has this one's packages but accelerate, and peft, which needs it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    there = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(("accelerate", "peft", "__pycache__")):
            (there / package.name).symlink_to(package)
    made = folder / "bin" / "python"
    found = subprocess.run([made, "-c", "import accelerate"], capture_output=True, text=True, timeout=60, check=False)
    assert "No module named 'accelerate'" in found.stderr, "these tests are for an environment without it"
    return made


CALLS = {
    "the README's first snippet": ["-c", FIRST_SNIPPET],
    "info": ["-m", "fluxvae.cli", "info", "demo"],
    "plan": ["-m", "fluxvae.cli", "plan", "1024x1024"],
    "decode": ["-m", "fluxvae.cli", "decode", "latents.safetensors", "--out", "images", "--checkpoint", "demo"],
}


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_said_where_all_is_well(call: str, python: Path, tmp_path: Path) -> None:
    latents, height, width = read_latents(DEFAULT_LATENTS)
    metadata = {"height": str(height), "width": str(width)}
    save_file({"latents": latents.contiguous()}, tmp_path / "latents.safetensors", metadata=metadata)
    done = subprocess.run(
        [python, *CALLS[call]], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "accelerate" not in done.stdout
