"""Without the packages of an extra, what needs them says which extra that is, in one message."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluxvae.errors import InvalidOptionError, MissingExtraError, status_of
from fluxvae.extras import needs
from fluxvae.serve.supervisor import checks

WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'ray', 'starlette', 'tritonclient', 'uvicorn'])); "


def test_a_missing_package_is_its_extra_and_other_errors_stay() -> None:
    says = r"^--ray: needs the extra 'batch' \(No module named 'no_such'\); pip install 'fluxvae\[batch\]'$"
    with pytest.raises(MissingExtraError, match=says), needs("batch", "--ray"):
        import no_such
    with pytest.raises(ImportError, match="no_such") as ours, needs("batch", "--ray"):
        from fluxvae import no_such  # type: ignore[attr-defined]  # noqa: F401
    assert not isinstance(ours.value, MissingExtraError), "no extra brings what fluxvae itself lacks"
    with pytest.raises(InvalidOptionError, match=r"^its own$"), needs("batch", "--ray"):
        raise InvalidOptionError("its own")
    with pytest.raises(MissingExtraError, match="'inner'"), needs("outer", "this"), needs("inner", "that"):
        raise ModuleNotFoundError("No module named 'inner'")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import fluxvae.client", "fluxvae.client: needs the extra 'client'"),
        ("from fluxvae.cli import main; sys.argv[1:] = ['serve']; main()", "fluxvae serve: needs the extra 'serve'"),
        (
            "import runpy; runpy.run_module('fluxvae.serve.gateway', run_name='__main__')",
            "the gateway: needs the extra 'serve'",
        ),
        (
            "from fluxvae.cli import main; sys.argv[1:] = ['decode', 'x.safetensors', '--out', 'x', '--ray']; main()",
            "--ray: needs the extra 'batch'",
        ),
    ],
    ids=["client", "serve", "gateway", "ray"],
)
def test_what_needs_one_names_it(code: str, says: str, tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(1, 4, 64, dtype=torch.float32, device="cpu")}, tmp_path / "x.safetensors")
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT + code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert says in " ".join(child.stderr.split()), child.stderr
    # A program's import ends as Python's own do; a command has the status of the error table.
    assert child.returncode == (1 if "import fluxvae.client" in code else status_of(MissingExtraError()).exit_code)
    assert ("Traceback" in child.stderr) == ("import fluxvae.client" in code)


def test_the_supervisor_looks_for_all_that_the_extra_brings() -> None:
    """Except urllib3, which only clients use. grpc comes with tritonclient[grpc]."""
    named = [line for line in importlib.metadata.requires("fluxvae") or [] if "extra == 'serve'" in line]
    brought = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in named}  # type: ignore[index]
    assert brought == {*checks._GATEWAY_PACKAGES, "urllib3"} - {"grpc"}
