"""Decodes under every setting of a process, and under every pair of settings. `test_settings.py` starts it.

``settings_matrix.py 1 winograd torch`` tries single settings (2: pairs too) with one kind of kernels or engine after
the other. It runs in a process of its own, because a tensor of the wrong dtype or device in compiled code can end the
process. It prints what it tries before it tries it, and ``all the same bits`` with the kind when it has tried all.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fluxvae import Decoder
from models import random_vae

Setting = Callable[[], AbstractContextManager[Any]]


class _Halving(TorchDispatchMode):
    """What every mode could do: another result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made / 2 if isinstance(made, torch.Tensor) and made.is_floating_point() else made


@contextlib.contextmanager
def _set(change: Callable[[], object], undo: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        undo()


def _attribute(holder: Any, name: str, value: Any) -> Setting:
    def setting() -> AbstractContextManager[Any]:
        before = getattr(holder, name)
        return _set(lambda: setattr(holder, name, value), lambda: setattr(holder, name, before))

    return setting


SETTINGS: dict[str, Setting] = {
    "default dtype bfloat16": lambda: _set(
        lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default dtype float64": lambda: _set(
        lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
    ),
    "default device meta": lambda: _set(
        lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)
    ),
    "with torch.device": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "deterministic": lambda: _set(
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "matmul precision": lambda: _set(
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    ),
    "TF32": lambda: _set(
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    ),
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "another dispatch": _Halving,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=False),
    "NumPy's errors": lambda: np.errstate(all="raise"),
    "threads": lambda: _set(lambda: torch.set_num_threads(3), lambda: torch.set_num_threads(1)),
}
if hasattr(torch.backends, "fp32_precision"):  # from PyTorch 2.9 on
    SETTINGS["float32 as bfloat16"] = _attribute(torch.backends, "fp32_precision", "bf16")
    SETTINGS["oneDNN's float32 as bfloat16"] = _attribute(torch.backends.mkldnn, "fp32_precision", "bf16")
THREADS = {"threads"}
"""PyTorch itself decides by them, which the reference engine leaves to it."""


def _default_device() -> object:
    try:
        return torch.get_default_device()
    except AttributeError:  # PyTorch 2.6's, after the default has been set to None
        return None


def _state() -> tuple[object, ...]:
    c = torch._C
    parts = [("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul")]
    parts += [("cuda", of) for of in ("all", "conv", "matmul", "rnn")]
    read = getattr(c, "_get_fp32_precision_getter", None)  # from PyTorch 2.9 on
    return (
        torch.get_default_dtype(),
        _default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        c._get_float32_matmul_precision(),
        *(read(*part) for part in parts if read is not None),
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_num_threads(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    )


def _tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip


def main(kind: str, together: int) -> None:
    torch.set_num_threads(1)
    options = {} if kind == "preview" else {"engine": "diffusers"} if kind == "diffusers" else {"kernels": kind}
    vae = _tiny() if kind == "preview" else random_vae()
    if kind == "winograd":
        vae.decoder.conv_in.bias = None  # what is made in a bias's place must have a dtype too
    latents = torch.randn(1, 16, 10, 12, generator=torch.Generator().manual_seed(1))
    demo_latents = latents[:, :, :6, :6].clone()
    old = Decoder(vae, **options)
    expected = old.decode(latents, output_type="np")
    expected_demo = None if kind == "preview" else Decoder.from_pretrained("demo", **options).decode(
        demo_latents, output_type="uint8"
    )  # fmt: skip
    names = [name for name in SETTINGS if kind != "diffusers" or name not in THREADS]
    for several in itertools.chain(*(itertools.combinations(names, n) for n in range(1, together + 1))):
        print(*several, sep=" and ", flush=True)
        with contextlib.ExitStack() as stack:
            try:
                for name in several:
                    stack.enter_context(SETTINGS[name]())
            except RuntimeError:
                continue  # PyTorch refuses these two together
            before = _state()
            decoders = [old] if len(several) > 1 else [old, Decoder(vae, **options)]
            made = [decoder.decode(latents, output_type="np") for decoder in decoders]
            if len(several) == 1 and expected_demo is not None:
                demo = Decoder.from_pretrained("demo", **options).decode(demo_latents, output_type="uint8")
                assert (demo == expected_demo).all(), "the demo's image changed"
            assert _state() == before, f"{before} became {_state()}"
        for image in made:
            assert (image == expected).all(), f"{(image != expected).mean():.1%} of the values changed"
    print(f"{kind}: all the same bits", flush=True)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        main(each, int(sys.argv[1]))
