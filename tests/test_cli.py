"""The command line answers --help at once, agrees with the library in plan and info, and shows one message an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from safetensors.torch import save_file
from typer.testing import CliRunner

from documents import parse
from family_models import flux2_vae, tiny_vae
from fluxvae import Decoder, __version__, cli
from fluxvae.errors import FluxVAEError, MemoryLimitError


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fluxvae.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", **env},
    )


def invoke(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_help_needs_no_pytorch() -> None:
    """The seconds before the first word are PyTorch's and diffusers'."""
    code = "import sys; from fluxvae.cli import app; app(['--help'], standalone_mode=False);"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'numpy')))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "Usage" in shown.stdout


@pytest.mark.parametrize("command", [[], ["decode"], ["plan"], ["info"], ["bench"], ["serve"]])
def test_help_teaches(command: list[str]) -> None:
    shown = run(*command, "--help").stdout
    assert "Examples:" in shown
    assert f"  fluxvae {' '.join(command)}".rstrip() in shown
    assert max(map(len, shown.splitlines())) <= 80
    if not command:
        assert "FLUXVAE_CHECKPOINT" in shown


COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_commands(name: str) -> None:
    examples = [line.strip() for line in COMMANDS[name].help.splitlines() if line.startswith(f"  fluxvae {name}")]
    assert examples
    for example in examples:
        parse(example.replace(" ... ", " ").partition("   ")[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_in_whole_sentences(name: str) -> None:
    for parameter in COMMANDS[name].params:
        text = parameter.help or ""
        assert text[:1].isupper(), parameter.name
        assert text.endswith("."), parameter.name


def test_version() -> None:
    assert invoke("--version") == f"fluxvae {__version__}\n"


def test_plan_is_the_decoders() -> None:
    shown = json.loads(invoke("plan", "512", "768", "--batch", "2", "--device", "cpu", "--json"))
    decoder = Decoder.from_pretrained("demo", device="cpu")
    plan = decoder.plan(512, 768, 2)
    assert (shown["height"], shown["width"], shown["batch"], shown["device"]) == (512, 768, 2, "cpu")
    assert (shown["peak_bytes"], shown["work_ratio"]) == (plan.peak_bytes, plan.work_ratio)
    assert shown["smallest_limit_bytes"] < plan.peak_bytes
    with pytest.raises(MemoryLimitError):
        Decoder.from_pretrained("demo", device="cpu", memory_limit=shown["smallest_limit_bytes"] - 1).plan(512, 768, 2)


def test_plan_for_people() -> None:
    shown = invoke("plan", "1024", "512", "--device", "cpu", "--memory-limit", "2GB")
    assert "1024 x 512 (height x width)" in shown
    assert "2.00 GB (memory_limit); the smallest that works" in shown
    assert "1024x512x" in shown, "a map of the last level"
    assert max(map(len, shown.splitlines())) <= 80


def test_info() -> None:
    shown = json.loads(invoke("info", "demo", "--json"))
    decoder = Decoder.from_pretrained("demo", device="cpu")
    assert shown["latent_channels"] == 16
    assert shown["packed_features"] == 64
    assert (shown["scaling_factor"], shown["shift_factor"]) == (
        decoder.format.scaling_factor,
        decoder.format.shift_factor,
    )
    assert shown["decoder_parameters"] == sum(p.numel() for p in decoder.vae.decoder.parameters())
    text = invoke("info", "demo")
    assert "64 features for 16 x 16 pixels" in text
    assert max(map(len, text.splitlines())) <= 80


def test_info_and_plan_of_the_rest_of_the_family(tmp_path: Path) -> None:
    vae = flux2_vae(decoder_widths=(32, 32, 64, 64))
    vae.save_pretrained(tmp_path / "flux2")
    tiny_vae(32).save_pretrained(tmp_path / "taef2")
    shown = json.loads(invoke("info", str(tmp_path / "flux2"), "--json"))
    assert (shown["model"], shown["packed_features"]) == ("AutoencoderKLFlux2", 128)
    assert (shown["scaling_factor"], shown["shift_factor"], shown["batch_norm_eps"]) == (None, None, 1e-4)
    assert shown["block_out_channels"] == [32, 32, 64, 64], "the decoder's"
    assert "sqrt(running_var + 0.0001) + running_mean" in invoke("info", str(tmp_path / "flux2"))
    save_file(vae.state_dict(), tmp_path / "file.safetensors")
    text = " ".join(invoke("info", str(tmp_path / "file.safetensors"), "--family", "flux2").split())
    assert "family flux2, by family= models FLUX.2, FLUX.3 and others" in text
    shown = json.loads(invoke("info", str(tmp_path / "taef2"), "--json"))
    assert (shown["model"], shown["approximate"], shown["packed_features"]) == ("AutoencoderTiny", True, 128)
    assert "a preview, not the image the full VAE decodes" in invoke("info", str(tmp_path / "taef2"))
    plan = ["plan", "64", "64", "--device", "cpu", "--checkpoint"]
    assert not json.loads(invoke(*plan, str(tmp_path / "flux2"), "--json"))["approximate"]
    assert json.loads(invoke(*plan, str(tmp_path / "taef2"), "--json"))["approximate"]
    assert "approximate preview" in " ".join(invoke(*plan, str(tmp_path / "taef2")).split())


def test_bench() -> None:
    arguments = ["bench", "--sizes", "64,128", "--rounds", "1", "--device", "cpu"]
    shown = json.loads(invoke(*arguments, "--json"))
    assert [row["size"] for row in shown["rows"]] == [64, 128]
    for row in shown["rows"]:
        assert row["seconds"] > 0
        assert row["planned_bytes"] == Decoder.from_pretrained("demo", device="cpu").plan(*[row["size"]] * 2).peak_bytes
    text = invoke(*arguments, "--diffusers")
    assert "128 x 128" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "cut off"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["info", "nothing/here/at/all"], 4, "CheckpointError: checkpoint: nothing at nothing/here/at/all; expected"),
        (["plan", "1000", "1001"], 2, "InvalidLatentsError: width: got 1001, expected a positive multiple of 8"),
        (["plan", "1024", "1024", "--memory-limit", "1MB"], 3, "MemoryLimitError: memory_limit: got 1000000 bytes"),
        (["plan", "64", "64", "--dtype", "int8"], 2, "InvalidOptionError: dtype: got 'int8'"),
        (["serve", "--drain", "0"], 2, "InvalidOptionError: drain_s: got 0.0, expected a number above 0"),
    ],
)
def test_errors_are_one_message_and_a_status(
    arguments: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["fluxvae", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == status
    assert said.err.startswith(message)
    assert said.out == ""


@pytest.mark.parametrize("command", [["info", "demo"], ["plan", "512x512", "--json"], ["--help"]])
def test_output_that_cannot_be_written(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "fluxvae.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr == (
        "the output cannot be written: No space left on device; free some space, or send it elsewhere\n"
    )


def test_an_error_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only fluxvae's own errors are messages; a bug keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["fluxvae", "info", "demo"])
    monkeypatch.setattr("fluxvae.checkpoints.open_checkpoint", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUXVAE_CHECKPOINT", str(tmp_path))
    with pytest.raises(FluxVAEError, match="no VAE in"):
        invoke("plan", "64", "64")
    monkeypatch.setenv("FLUXVAE_CHECKPOINT", "demo")
    monkeypatch.setenv("FLUXVAE_MEMORY_LIMIT", "1MB")
    with pytest.raises(MemoryLimitError):
        invoke("plan", "1024", "1024")


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["512x768"], (512, 768)),
        (["512X768"], (512, 768)),
        (["512", "768"], (512, 768)),
        (["512"], (512, 512)),
        (["512 x 768"], (512, 768)),
    ],
)
def test_plan_takes_a_size_as_people_write_it(words: list[str], size: tuple[int, int]) -> None:
    shown = json.loads(invoke("plan", *words, "--device", "cpu", "--json"))
    assert (shown["height"], shown["width"]) == size


@pytest.mark.parametrize("words", [["1024x"], ["x"], ["0x8"], ["8x8x8"], ["8", "8", "8"], ["wide"], ["1e3"], ["8.5x8"]])
def test_plan_refuses_what_is_no_size(words: list[str]) -> None:
    with pytest.raises(FluxVAEError, match=r"^size: got .*, expected HEIGHTxWIDTH in pixels, such as 1024x768"):
        invoke("plan", *words)


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "1024x1024", "--device", "cpu"],
        ["plan", "1024x1024", "--device", "cpu", "--kernels", "torch"],
        ["info", "demo"],
        ["--help"],
    ],
)
def test_what_answers_at_once_imports_nothing_heavy(command: list[str]) -> None:
    """Seconds of each call were imports of what none of them needs: PyTorch alone takes two."""
    heavy = ("torch", "diffusers", "transformers", "sympy", "torchvision", "accelerate", "pandas")
    heavy += ("numba", "scipy") if command[0] != "plan" else ()
    heavy += ("rich", "numpy") if command[0] == "--help" else ()
    code = f"import sys; from fluxvae.cli import app; app({command!r}, standalone_mode=False);"
    code += f"print('imported:', [name for name in {heavy!r} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == "imported: []"
