"""What a process has set for its own models changes no image, and is as it was afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import contextlib, sys, torch
from fluxvae import Decoder
from models import random_vae

torch.set_num_threads(1)
kind, which = sys.argv[1:]
options = {"engine": "diffusers"} if kind == "diffusers" else {"engine": "exact", "kernels": kind}
vae = random_vae()
for module in vae.decoder.modules():
    if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and which == "without bias":
        module.bias = None
latents = torch.randn(1, 16, 10, 12, generator=torch.Generator().manual_seed(1))
before = Decoder(vae, **options).decode(latents, output_type="np")


def process(change, undo):
    @contextlib.contextmanager
    def around():
        change()
        try:
            yield
        finally:
            undo()
    return around()


def default_dtype():
    return process(lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32))


settings = {
    "default dtype": default_dtype,
    "without bias": default_dtype,
    "default device": lambda: process(
        lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)
    ),
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "grad": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: process(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "matmul precision": lambda: process(
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    ),
    "oneDNN": lambda: process(
        lambda: torch._C._set_mkldnn_enabled(False), lambda: torch._C._set_mkldnn_enabled(True)
    ),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}
with settings[which]():
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    device = torch.get_default_device()
    autocast, oned = torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.enabled
    flash = torch.backends.cuda.flash_sdp_enabled()
    for decoder in (Decoder(vae, **options), Decoder(vae, **options)):
        after = decoder.decode(latents, output_type="np")
        assert (after == before).all(), f"{(after != before).mean():.1%} of the values changed"
    kept = torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_default_device()
    assert kept == (precision, dtype, device)
    assert (autocast, oned, flash) == (
        torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled()
    )
print("the same bits")
"""


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("winograd", "default dtype"),
        ("winograd", "without bias"),
        ("winograd", "default device"),
        ("torch", "device context"),
        ("torch", "autocast"),
        ("torch", "matmul precision"),
        ("torch", "inference mode"),
        ("torch", "oneDNN"),
        ("diffusers", "default dtype"),
        ("diffusers", "autocast"),
        ("diffusers", "attention"),
        ("diffusers", "deterministic"),
        ("winograd", "grad"),
    ],
)
def test_a_setting_of_the_process_changes_no_image(kind: str, which: str) -> None:
    """Each in a process of its own, for a tensor of the wrong dtype or device can end it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, which],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("the same bits")
