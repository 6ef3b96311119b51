"""Single files: any names and prefixes, what ``torch.save`` wrote, 8-bit floats; files that are not what they seem."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from checkpoint_files import bfl_state_dict, flux2_bfl_state_dict, old_names, sd_vae, to_fp8
from checkpoints.test_folders import same
from family_models import flux2_vae, tiny_vae
from fluxvae import CheckpointError
from fluxvae import checkpoints as checkpoints_package
from fluxvae.checkpoints import load_vae, open_checkpoint
from models import random_vae

PREFIXES = ["", "vae.", "first_stage_model.", "model.vae.", "model.first_stage_model.", "autoencoder.", "a.b.c."]
MODELS: dict[str, tuple[Callable[[], AutoencoderKL], Callable[[AutoencoderKL], dict[str, torch.Tensor]]]] = {
    "flux1, diffusers": (random_vae, lambda vae: dict(vae.state_dict())),
    "flux1, BFL": (random_vae, bfl_state_dict),
    "flux1, old": (random_vae, old_names),
    "sd, diffusers": (sd_vae, lambda vae: dict(vae.state_dict())),
    "sd, LDM": (sd_vae, bfl_state_dict),
    "flux2, diffusers": (flux2_vae, lambda vae: dict(vae.state_dict())),
    "flux2, BFL": (flux2_vae, flux2_bfl_state_dict),
    "preview": (tiny_vae, lambda vae: dict(vae.state_dict())),
}
FAMILY = {"flux1": "flux1", "sd": "sd", "flux2": "flux2", "preview": "flux1"}
OTHERS = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3, 3),
    "text_encoders.t5xxl.transformer.decoder.block.0.weight": torch.zeros(2),
    "double_blocks.0.txt_attn.weight": torch.zeros(2),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".pt", ".ckpt"])
def test_names_prefixes_and_formats(tmp_path: Path, model: str, suffix: str) -> None:
    make, names = MODELS[model]
    vae = make()
    family = FAMILY[model.split(",")[0]]
    for number, prefix in enumerate(PREFIXES):
        weights = {f"{prefix}{key}": tensor for key, tensor in names(vae).items()} | (OTHERS if prefix else {})
        path = tmp_path / f"{number}{suffix}"
        if suffix in (".pt", ".ckpt"):
            torch.save({"state_dict": weights, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}}}, path)
        else:
            save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
        found = open_checkpoint(path, family=family)
        assert found.prefix == ("state_dict." if suffix in (".pt", ".ckpt") else "") + prefix
        same(found.load(), vae)


# Of "sd, LDM" the decoder by itself is not all that decoding needs, and a preview's has no name.
@pytest.mark.parametrize(
    ("model", "bare"),
    [
        *((model, False) for model in ("flux1, BFL", "sd, LDM", "flux1, diffusers", "preview")),
        *((model, True) for model in ("flux1, BFL", "flux1, diffusers")),
    ],
)
def test_decoder_only(tmp_path: Path, model: str, bare: bool) -> None:
    make, names = MODELS[model]
    vae = make()
    half = {key: tensor for key, tensor in names(vae).items() if key.startswith(("decoder.", "post_quant_conv."))}
    save_file(
        {key.removeprefix("decoder." if bare else ""): x.contiguous() for key, x in half.items()}, tmp_path / "d.sft"
    )
    same(load_vae(tmp_path / "d.sft", family="sd" if "sd" in model else "flux1"), vae)


def test_bit_identity_with_diffusers_single_files(tmp_path: Path) -> None:
    """diffusers' own loading of single files is the oracle where it can be: names of BFL's, in half precision too."""
    vae = random_vae(seed=5, widths=(32, 32, 64, 64), layers_per_block=2)
    save_file(bfl_state_dict(vae), tmp_path / "ae.safetensors")
    vae.save_config(tmp_path / "config")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = AutoencoderKL.from_single_file(
            str(tmp_path / "ae.safetensors"), config=str(tmp_path / "config"), torch_dtype=dtype, local_files_only=True
        )
        same(load_vae(tmp_path / "ae.safetensors", dtype=dtype, family="flux1"), expected)


def test_several_vaes_in_one_file(tmp_path: Path) -> None:
    weights = bfl_state_dict(random_vae())
    both = {f"{prefix}{key}": tensor.clone() for prefix in ("model.", "ema.") for key, tensor in weights.items()}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 VAE decoders, .*(model|ema).decoder.*expected one"):
        load_vae(tmp_path / "both.safetensors")


def test_only_the_vaes_bytes_are_read(tmp_path: Path) -> None:
    """A checkpoint that holds everything: the rest of it, a hole of 60 GB in this file, is not read."""
    vae = random_vae()
    weights = {f"vae.{key}": tensor for key, tensor in bfl_state_dict(vae).items()}
    header: dict[str, object] = {}
    offset = 0
    for key, tensor in weights.items():
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    rest = 30_000_000_000
    header["model.diffusion_model.double_blocks.0.img_mod.lin.weight"] = {
        "dtype": "BF16", "shape": [rest], "data_offsets": [offset, offset + 2 * rest],
    }  # fmt: skip
    text = json.dumps(header).encode()
    path = tmp_path / "everything.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in weights.values():
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(text) + offset + 2 * rest)
    found = open_checkpoint(path)
    assert (found.family, found.assumed) == ("flux1", "")
    same(found.load(), vae)


# -- 8-bit floats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, "scale_weight", "weight_scale"])
@pytest.mark.parametrize("eight", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("by_channel", [False, True])
def test_fp8(tmp_path: Path, scale: str | None, eight: torch.dtype, by_channel: bool) -> None:
    vae = random_vae()
    stored, meant = to_fp8(bfl_state_dict(vae), scale, eight, by_channel=by_channel)
    save_file(stored, tmp_path / "stored.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    for dtype in (None, torch.float32, torch.bfloat16):
        found = open_checkpoint(tmp_path / "stored.safetensors", family="flux1")
        assert found.scaled == (scale is not None)
        assert str(eight).removeprefix("torch.") in found.stored_dtypes
        same(found.load(dtype), load_vae(tmp_path / "meant.safetensors", dtype=dtype, family="flux1"))


def comfy_quant(format: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)


def test_markers_of_scaled_fp8(tmp_path: Path) -> None:
    """As ComfyUI writes them: each may be there, and none of them changes what the weights are."""
    vae = random_vae()
    stored, meant = to_fp8(bfl_state_dict(vae), "weight_scale")
    save_file(meant, tmp_path / "meant.safetensors")
    expected = load_vae(tmp_path / "meant.safetensors", family="flux1")
    layers = [key.removesuffix(".weight") for key in stored if f"{key}_scale" in stored]
    marked = {f"{layer}.comfy_quant": comfy_quant("float8_e4m3fn") for layer in layers}
    inputs = {f"{layer}.input_scale": torch.tensor(0.5) for layer in layers}
    for extra in (marked, inputs, {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}):
        save_file(stored | extra, tmp_path / "stored.safetensors")
        same(load_vae(tmp_path / "stored.safetensors", family="flux1"), expected)
    text = json.dumps({"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}})
    save_file(stored, tmp_path / "stored.safetensors", metadata={"_quantization_metadata": text})
    same(load_vae(tmp_path / "stored.safetensors", family="flux1"), expected)


LAYER = "decoder.mid.attn_1.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {f"{LAYER}.comfy_quant": comfy_quant("nvfp4")}, r"attn_1.q has the format 'nvfp4'"),
        (lambda w: w | {f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "comfy_quant has a description"),
        (
            lambda w: w | {f"{LAYER}.weight": torch.zeros(32, 32, 1, 1, dtype=torch.int8)},
            "a scale of a weight that is int8",
        ),
        (lambda w: w | {f"{LAYER}.weight_scale": torch.ones(2, 2)}, r"a scale of shape \[2, 2\]"),
        (lambda w: w | {f"{LAYER}.weight_scale_2": torch.ones(1)}, "a tensor 'weight_scale_2' beside its weight"),
        (lambda w: w | {f"{LAYER}.scale_weight": torch.ones(1)}, "holds two scales of"),
        (lambda w: {k: v for k, v in w.items() if k != f"{LAYER}.weight"}, "_scale without the weight decoder.mid"),
        (
            lambda w: {k: v for k, v in w.items() if k != f"{LAYER}.weight_scale"} | {"scaled_fp8": torch.zeros(2)},
            "its scale is lost",
        ),
    ],
)
def test_other_quantisation_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    stored, _ = to_fp8(bfl_state_dict(random_vae()), "weight_scale")
    save_file(change(stored), tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_vae(tmp_path / "ae.safetensors")


# -- files that are not what they seem -----------------------------------------------------------------------------


def saved(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as given, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in given.namelist():
            packed.writestr(name, given.read(name))
    return buffer.getvalue()


class Bytes:
    """Takes as many bytes as it says, and PyTorch allows it."""

    def __reduce__(self) -> tuple[object, ...]:
        return bytearray, (10**11,)


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


class Foreign:
    """What a trainer's callbacks leave in a checkpoint: an object, not a tensor."""


def whole() -> dict[str, torch.Tensor]:
    return bfl_state_dict(random_vae())


def header(fields: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


HUGE = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
STRANGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"is empty \(0 bytes\)"),
    "gguf": (lambda: b"GGUF" + bytes(100), "is a GGUF file"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    "html": (lambda: b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "text": (lambda: b"Entry not found", "another kind of file|neither a safetensors"),
    "absurd sizes": (lambda: header({"decoder.conv_in.weight": HUGE}), "truncated: its header lists tensors up to"),
    "absurd header": (lambda: struct.pack("<Q", 2**62) + b"{", "claims a header of 46.* bytes"),
    "shape and bytes": (
        lambda: header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"1234"),
        "has 4 bytes by its header",
    ),
    "overlap": (
        lambda: header({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"1234"),
        "is said to begin",
    ),
    "not JSON": (lambda: struct.pack("<Q", 4) + b"{abc", "its header is not JSON"),
    "truncated zip": (lambda: saved(whole())[:-5000], "is truncated"),
    "truncated legacy": (lambda: saved(whole(), _use_new_zipfile_serialization=False)[:-5000], "is truncated"),
    "an object": (lambda: saved({"state_dict": whole(), "callback": Foreign()}), r"refuses it .*convert it where"),
    "plain pickle": (lambda: pickle.dumps({"a": Foreign()}), "refuses it|cannot be read by torch.load"),
    "expanded": (
        lambda: saved({"decoder.conv_in.weight": torch.zeros(1).expand(1000, 1000, 3, 3)}), "of which the file holds",
    ),
    "bytearray": (lambda: saved(whole() | {"x": Bytes()}), "holds a bytearray"),
    "bytearray, legacy": (
        lambda: saved(whole() | {"x": Bytes()}, _use_new_zipfile_serialization=False), "holds a bytearray",
    ),
    "TorchScript": (script, "is a TorchScript archive, a program"),
    "encoder": (
        lambda: saved({f"model.vae.{k}": v for k, v in whole().items() if k.startswith("encoder")}), "an encoder only",
    ),
    "compressed": (lambda: compressed(saved(whole())), "is a compressed archive"),
    "another zip": (lambda: compressed(saved(whole())).replace(b"data.pkl", b"dato.pkl"), "torch.save did not write"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["ae.safetensors", "ae.ckpt"])
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_files_are_called_what_they_are(tmp_path: Path, kind: str, name: str) -> None:
    make, message = STRANGE[kind]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(CheckpointError, match=message) as raised:
        load_vae(tmp_path / name)
    assert name in str(raised.value)


def test_a_pickle_cut_anywhere_is_called_truncated(tmp_path: Path) -> None:
    """But where the cut leaves a half name, which reads like one that is not allowed."""
    few = {f"decoder.{n}.weight": torch.zeros(2) for n in range(4)}
    data = saved(few, _use_new_zipfile_serialization=False)
    for length in range(1, len(data)):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        half_a_name = re.search(rb"c[a-z_.]*\n?\w*\Z", data[:length]) is not None
        told = r"is truncated: .*download it again" + ("|refuses it .*Unsupported global" if half_a_name else "")
        with pytest.raises(CheckpointError, match=told):
            load_vae(tmp_path / "cut.pt")


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Code()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="runs no code"):
        load_vae(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w | {"decoder.up.999999999.block.0.conv1.weight": torch.zeros(1)},
        lambda w: w | {f"decoder.up.0.block.{n}.conv1.weight": torch.zeros(1) for n in range(40)},
        lambda w: w | {"decoder.up.0.attn.0.q.weight": torch.zeros(1)},
        lambda w: w | {"decoder.conv_out.weight": torch.zeros(3, 7, 3, 3)},
        lambda w: w | {"decoder.up.1.block.0.conv1.weight": torch.zeros(33, 32, 3, 3)},
        lambda w: w | {"decoder.up.1.block.0.conv1.weight": torch.zeros(4)},
        lambda w: {"decoder.conv_in.weight": w["decoder.conv_in.weight"]},
        lambda w: {k.replace("decoder.", "encoder."): v for k, v in w.items()},
        lambda w: {"decoder.conv_in.weight": torch.zeros(4, 16, 3, 3, 3)},
    ],
)
def test_other_networks_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    save_file(change(whole()), tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match=r"ae\.safetensors"):
        load_vae(tmp_path / "ae.safetensors", family="flux1")


# -- the process ---------------------------------------------------------------------------------------------------

AMBIENT = """
import sys, torch
from fluxvae.checkpoints import load_vae
paths = sys.argv[1:]
def weights():
    return [load_vae(path, dtype=torch.float32, family=family).state_dict()
            for path, family in zip(paths, ("flux1", "flux2", "flux1", "flux1"))]
before = weights()
torch.set_default_dtype(torch.bfloat16)
after = [weights()]
torch.set_default_dtype(torch.float64)
after.append(weights())
torch.set_default_dtype(torch.float32)
with torch.device("meta"):
    after.append(weights())
torch.set_default_device("meta")
after.append(weights())
torch.set_default_device(None)
with torch.inference_mode():
    after.append(weights())
for states in after:
    for state, expected in zip(states, before):
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert tensor.dtype == expected[name].dtype and tensor.device.type == "cpu", name
            assert torch.equal(tensor, expected[name]) and not tensor.is_inference() and not tensor.requires_grad, name
"""


def test_nothing_ambient_changes_what_is_loaded(tmp_path: Path) -> None:
    """In a process of its own: the settings are the whole process's. Nothing is printed either."""
    save_file(to_fp8(whole(), "scale_weight")[0], tmp_path / "flux1.safetensors")
    torch.save({"state_dict": whole()}, tmp_path / "flux1.pt")
    flux2_vae().save_pretrained(tmp_path / "flux2")
    tiny_vae().save_pretrained(tmp_path / "tiny")
    command = [
        sys.executable,
        "-c",
        AMBIENT,
        *(str(tmp_path / name) for name in ("flux1.safetensors", "flux2", "tiny", "flux1.pt")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


LIGHT = """
import sys, types
package = types.ModuleType("fluxvae")  # the package itself may import what it likes
package.__path__ = [sys.argv[1]]
sys.modules["fluxvae"] = package
import fluxvae.checkpoints
print([name for name in ("torch", "diffusers", "huggingface_hub", "safetensors") if name in sys.modules])
"""


def test_importing_it_is_light() -> None:
    folder = Path(checkpoints_package.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
