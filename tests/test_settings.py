"""What a process has set for its own models changes no image of ours, and is the same after a decode as before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxvae import Decoder, InvalidLatentsError, InvalidOptionError
from fluxvae.engine import settings
from fluxvae.engine.settings import set_aside
from fluxvae.latents.values import plain
from models import random_vae

CPU = torch.device("cpu")


def _run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
    )


def _matrix(together: int, *kinds: str) -> None:
    """In a process of its own: a tensor of the wrong dtype or device in compiled code can end it."""
    done = _run("settings_matrix.py", str(together), *kinds)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert [line for line in said if "same bits" in line] == [f"{kind}: all the same bits" for kind in kinds]


KINDS = ("winograd", "torch", "diffusers", "preview")


def test_no_setting_of_the_process_changes_an_image() -> None:
    """All kinds in one process, most of whose time is the start."""
    _matrix(1, *KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_two_settings_of_the_process_change_an_image(kind: str) -> None:
    _matrix(2, kind)


@pytest.mark.parametrize("variable", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_an_environment_that_lowers_float32_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """oneDNN reads it once: with bf16, convolutions differ by 1e-2, whatever PyTorch's own switches say."""
    decoder = Decoder(random_vae())
    latents = torch.zeros(1, 16, 4, 4)
    monkeypatch.setenv(variable, "BF16")
    for kind in ("exact", "diffusers"):
        with pytest.raises(InvalidOptionError, match=f"^{variable}: got 'BF16' in the environment"):
            Decoder(random_vae(), engine=kind).decode(latents)
    monkeypatch.setenv(variable, "strict")
    decoder.decode(latents)


BY_BACKEND = hasattr(torch._C, "_get_fp32_precision_getter")
"""From PyTorch 2.9 on each backend has a precision of its own."""


def _values() -> list[Any]:
    return [switch.read() for switch in settings._process.switches]


def test_every_switch_is_its_default_within_and_as_it_was_afterwards() -> None:
    """Set as a caller does, by PyTorch's own functions: one general precision comes back as that, not as many."""
    torch.set_float32_matmul_precision("medium")
    if BY_BACKEND:
        torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = _values()
        with set_aside(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not BY_BACKEND or torch.backends.fp32_precision == "none"
            assert not torch.backends.cudnn.benchmark
            assert torch.backends.cuda.flash_sdp_enabled()
        assert _values() == before
        if BY_BACKEND:
            torch.backends.fp32_precision = "ieee"  # whatever had only inherited "tf32" inherits this
            assert torch._C._get_fp32_precision_getter("mkldnn", "conv") == "ieee"
    finally:
        if BY_BACKEND:
            torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_flash_sdp(True)


def test_a_switch_that_is_set_during_a_decode_stays_so() -> None:
    try:
        with set_aside(CPU):
            torch.backends.cudnn.benchmark = True
            with set_aside(CPU):  # another decode begins, and computes with the default
                assert not torch.backends.cudnn.benchmark
            torch.backends.cudnn.deterministic = True
        assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False


def test_the_last_of_several_decodes_puts_the_settings_back() -> None:
    torch.backends.cudnn.benchmark = True
    inside, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with set_aside(CPU):
            inside.set()
            assert go_on.wait(60)

    thread = threading.Thread(target=other)
    try:
        with set_aside(CPU):
            thread.start()
            assert inside.wait(60)
        assert not torch.backends.cudnn.benchmark, "the other decode still runs"
        go_on.set()
        thread.join(60)
        assert torch.backends.cudnn.benchmark
    finally:
        go_on.set()
        torch.backends.cudnn.benchmark = False


def test_a_child_that_is_forked_during_a_decode_has_the_callers_settings() -> None:
    """The thread that decodes does not exist there, so nobody else would put them back, or let go of the lock."""
    script = (
        "import os, sys, torch\n"
        "from fluxvae.engine.settings import set_aside\n"
        "torch.set_num_threads(1)\n"
        "torch.backends.cudnn.benchmark = True\n"
        "with set_aside(torch.device('cpu')):\n"
        "    assert not torch.backends.cudnn.benchmark\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        kept = torch.backends.cudnn.benchmark\n"
        "        with set_aside(torch.device('cpu')):\n"
        "            inside = torch.backends.cudnn.benchmark\n"
        "        os._exit(0 if (kept, inside, torch.backends.cudnn.benchmark) == (True, False, True) else 7)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
        "assert torch.backends.cudnn.benchmark\n"
    )
    done = _run("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(1, 16, 4, 4)


class _Named(torch.Tensor):
    """As libraries have them: a subclass that computes as a tensor does."""


LATENTS = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "fake": (_fake, "FakeTensor, which stands for values that are elsewhere"),
    "sparse": (LATENTS.to_sparse, "sparse_coo tensor, expected a dense one"),
    "nested": (lambda: torch.nested.nested_tensor([LATENTS[0]]), "nested tensor, expected a dense one"),
    "meta": (lambda: LATENTS.to("meta"), "on the meta device, which holds no values"),
}


@pytest.mark.parametrize("engine", ["exact", "diffusers"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_that_holds_no_values_of_its_own_is_refused(name: str, engine: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InvalidLatentsError, match=f"^latents: got .*{words}"):
        Decoder(random_vae(), engine=engine).decode(make())


def test_a_decode_inside_vmap_is_refused() -> None:
    decoder = Decoder(random_vae())
    with pytest.raises(InvalidLatentsError, match="inside torch.vmap"):
        torch.vmap(lambda one: decoder.decode_raw(one[None]))(LATENTS)


def test_a_tensor_of_another_class_or_view_is_decoded_as_its_values() -> None:
    """Among them one whose memory holds the negatives: compiled code would read those."""
    decoder = Decoder(random_vae())
    expected = decoder.decode_raw(LATENTS)
    negative = torch.complex(torch.zeros_like(LATENTS), -LATENTS).conj().imag
    assert negative.is_neg()
    for kind in (
        LATENTS.as_subclass(_Named),
        torch.nn.Parameter(LATENTS),
        LATENTS.clone().requires_grad_(),
        negative,
        LATENTS.to(memory_format=torch.channels_last),
        LATENTS.expand(1, 16, 4, 4),
    ):
        made = decoder.decode_raw(kind)
        assert type(made) is torch.Tensor
        assert not made.requires_grad
        assert torch.equal(made, expected)
    assert type(plain(LATENTS.as_subclass(_Named))) is torch.Tensor
