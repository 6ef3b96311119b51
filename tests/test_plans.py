"""`plan_decode` gives a decoder's own plan, but reads no weights and, on a CPU, does not even import PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_models import needs_vector_code
from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, FluxVAEError, InvalidLatentsError, InvalidOptionError, MemoryLimitError, plans
from fluxvae.devices import computes_directly
from fluxvae.engine.plan import Plan
from fluxvae.plans import plan_decode
from models import random_vae

VAES: dict[str, Callable[[], Any]] = {
    "demo": lambda: None,
    "odd widths": lambda: random_vae(),
    "flux2": flux2_vae,
    "preview": lambda: tiny_vae(16),
}


def saved(name: str, folder: Path) -> str:
    vae = VAES[name]()
    if vae is None:
        return "demo"
    vae.save_pretrained(folder)
    return str(folder)


def timeless(plan: Plan) -> str:
    """Without the free memory of the moment."""
    return str(plan).partition(", limit")[0] + str(plan).partition("\n")[2] + repr(plan.layers)


@needs_vector_code
@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize(
    ("dtype", "kernels"), [("auto", "auto"), ("bfloat16", "winograd"), ("float16", "auto"), ("float32", "torch")]
)
def test_plans_are_the_decoders(name: str, dtype: str, kernels: str, tmp_path: Path, threads_kept: None) -> None:
    source = saved(name, tmp_path)
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    options |= {} if name == "preview" else {"kernels": kernels}
    if name == "preview" and dtype != "auto" and not computes_directly(getattr(torch, dtype), torch.device("cpu")):
        for refused in (Decoder.from_pretrained, lambda source, **options: plan_decode(source, 64, 96, **options)):
            with pytest.raises(InvalidOptionError, match=f"on a processor without {dtype} arithmetic"):
                refused(source, **options)
        return
    decoder = Decoder.from_pretrained(source, **options)
    for threads, size in ((1, (64, 96, 2)), (3, (256, 128, 1))):
        torch.set_num_threads(threads)
        planned = plan_decode(source, *size, **options)
        assert timeless(planned.plan) == timeless(decoder.plan(*size))
        smallest = decoder.engine.smallest_limit(size[0] // 8, size[1] // 8, size[2])
        assert planned.smallest_limit == smallest
        assert (planned.device, planned.dtype) == (str(decoder.device), str(decoder.dtype).removeprefix("torch."))
        assert (planned.approximate, planned.assumed) == (decoder.approximate, decoder.assumed)
        limited = Decoder.from_pretrained(source, memory_limit=smallest, **options)
        assert str(plan_decode(source, *size, memory_limit=smallest, **options).plan) == str(limited.plan(*size))
        with pytest.raises(MemoryLimitError) as ours:
            plan_decode(source, *size, memory_limit=smallest - 1, **options)
        with pytest.raises(MemoryLimitError) as theirs:
            Decoder.from_pretrained(source, memory_limit=smallest - 1, **options).plan(*size)
        assert str(ours.value) == str(theirs.value)


def test_where_the_faster_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch, threads_kept: None) -> None:
    """PyTorch's serve, and the plan says why."""
    monkeypatch.setattr("fluxvae.engine.kernels.choose.no_winograd", lambda device: "this machine is too old for them")
    decoder = Decoder.from_pretrained("demo", device="cpu")
    plan = plan_decode("demo", 64, 96, device="cpu").plan
    assert plan.kernels == "torch"
    assert "Winograd would be faster, but this machine is too old for them" in plan.kernels_note
    assert timeless(plan) == timeless(decoder.plan(64, 96))
    with pytest.raises(InvalidOptionError, match="this machine is too old for them"):
        plan_decode("demo", 64, 96, device="cpu", kernels="winograd")


REFUSED: list[tuple[dict[str, Any], type[FluxVAEError]]] = [
    ({"device": "tpu"}, InvalidOptionError),
    ({"dtype": "int8"}, InvalidOptionError),
    ({"kernels": "magic"}, InvalidOptionError),
    ({"kernels": "cuda", "device": "cpu"}, InvalidOptionError),
    ({"memory_limit": "lots"}, InvalidOptionError),
    ({"memory_limit": 0}, InvalidOptionError),
]


@pytest.mark.parametrize(("options", "error"), REFUSED, ids=str)
def test_what_a_decoder_refuses_is_refused_in_its_words(options: dict[str, Any], error: type[FluxVAEError]) -> None:
    with pytest.raises(error) as ours:
        plan_decode("demo", 64, 64, **options)
    with pytest.raises(error) as theirs:
        Decoder.from_pretrained("demo", **options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("size", [(60, 64), (64, 0), (64, -8), (64, 64, 0)])
def test_sizes_that_nothing_decodes_to(size: tuple[int, ...]) -> None:
    with pytest.raises(InvalidLatentsError) as ours:
        plan_decode("demo", *size, device="cpu")
    with pytest.raises(InvalidLatentsError) as theirs:
        Decoder.from_pretrained("demo").plan(*size)
    assert str(ours.value) == str(theirs.value)


def test_a_gpus_driver_is_asked_about_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there may be a GPU, only PyTorch knows whether it can use it."""
    monkeypatch.setattr(plans, "_GPU_FILES", ("/dev/null",))
    assert not plans._on_cpu("auto")
    assert plans._on_cpu("cpu")
    assert not plans._on_cpu("cuda")


ASK = """
import json, sys
from fluxvae.engine import torch_library
from fluxvae.plans import plan_decode
found = plan_decode("demo", 256, 384, device="cpu").plan
alone = [torch_library.threads(), torch_library.has_onednn(), found.peak_bytes]
imported = "torch" in sys.modules
import torch
from fluxvae import Decoder
whole = [torch.get_num_threads(), torch._C._has_mkldnn, Decoder.from_pretrained("demo").plan(256, 384).peak_bytes]
print(json.dumps([imported, alone, whole, torch_library.threads()]))
"""


@needs_vector_code
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch itself is asked")
@pytest.mark.parametrize("setting", ["OMP_NUM_THREADS=3", "MKL_NUM_THREADS=1"])
def test_pytorchs_library_says_what_pytorch_says(setting: str) -> None:
    name, _, value = setting.partition("=")
    others = {key: one for key, one in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command, environment = [sys.executable, "-c", ASK], others | {name: value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    imported, alone, whole, later = json.loads(done.stdout)
    assert not imported
    assert alone == whole
    assert later == whole[0]
