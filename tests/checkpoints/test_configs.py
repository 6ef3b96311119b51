"""A config.json that no model has is refused by the name of what is wrong, at once, before anything is built of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fluxvae.checkpoints import ASSETS, open_checkpoint
from fluxvae.errors import CheckpointError

DEMO: dict[str, Any] = json.loads((ASSETS / "demo" / "config.json").read_text())


def opened(config: str, folder: Path) -> str:
    """The refusal of the demo's weights with this config."""
    (folder / "config.json").write_text(config)
    for weights in (ASSETS / "demo").glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(folder)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers_per_block", 10**9, "layers_per_block 1000000000, expected at most 64"),
        ("layers_per_block", 1e9, "layers_per_block 1000000000.0, expected at most 64"),
        ("layers_per_block", float("nan"), "layers_per_block nan"),
        ("block_out_channels", [64] * 9, "at most 8 levels"),
        ("scaling_factor", float("nan"), "scaling_factor nan, expected a finite number"),
        ("scaling_factor", 0, "scaling_factor 0, expected a number other than 0"),
        ("scaling_factor", "0.3611", "scaling_factor '0.3611', expected a finite number"),
        ("shift_factor", float("-inf"), "shift_factor -inf, expected a finite number"),
        ("shift_factor", True, "shift_factor True, expected a finite number"),
        ("latents_mean", [0.0, float("nan")], "latents_mean"),
        ("latents_std", "x", "latents_std 'x', expected a list of finite numbers"),
        ("norm_num_groups", 0, "cannot be built as AutoencoderKL from config.json"),
        ("latent_channels", 10**12, "decoder.conv_in.weight among them"),
    ],
)
def test_numbers_that_no_model_has(name: str, value: object, words: str, tmp_path: Path) -> None:
    assert words in opened(json.dumps(DEMO | {name: value}), tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not readable as JSON"),
        ('{"a":' * 100_000, "not readable as JSON"),
        ("null", "describes no diffusers model"),
        ("[1]", "describes no diffusers model"),
    ],
    ids=["a deep list", "a deep object", "null", "a list"],
)
def test_what_is_no_config(text: str, words: str, tmp_path: Path) -> None:
    assert words in opened(text, tmp_path)


def test_a_preview_of_more_blocks_than_any(tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderTiny", "num_decoder_blocks": [3, 10**9, 3, 1]}
    assert "num_decoder_blocks [3, 1000000000, 3, 1], expected at most 64" in opened(json.dumps(config), tmp_path)
