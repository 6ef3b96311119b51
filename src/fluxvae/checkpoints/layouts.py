"""Finds the VAE among the tensors of a file and translates their names into diffusers' names.

The names may have any prefix, and may be BFL's, diffusers' current or old ones, Wan's (see `wan`) or a preview's.
`find_vae` looks for the tensor that each kind of decoder begins with, and what stands before its name is the prefix.
Everything else in the file (a transformer, text encoders) stays unread. `diffusers_name` translates BFL's names.

Sources of the names: BFL's ``flux/modules/autoencoder.py`` (SD's, SDXL's and SD3's are the same) and
``flux2/autoencoder.py``, whose quantisation convolutions lie inside encoder and decoder; diffusers'
``_fix_state_dict_keys_on_load`` for the old names of attention; madebyollin's ``taesd.py`` for previews.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fluxvae.checkpoints import wan
from fluxvae.checkpoints.entries import Entry
from fluxvae.checkpoints.strangers import TAKEN, no_vae, stranger
from fluxvae.errors import CheckpointError

__all__ = ["MOST_LEVELS", "Vae", "diffusers_name", "find_vae", "holds_vae", "linear_shape"]

MOST_LEVELS = 8
"""The most levels that any autoencoder has. A file that claims more is damaged."""
_CONV_IN = "decoder.conv_in.weight"
_FIRST = {
    "full": (re.compile(r"(?P<prefix>(?:.*\.)?)decoder\.conv_in\.weight"), (4, 5)),
    "wan": (re.compile(r"(?P<prefix>(?:.*\.)?)decoder\.conv1\.weight"), (5,)),
    "preview": (re.compile(r"(?P<prefix>(?:.*\.)?)decoder\.layers\.0\.weight"), (4,)),
    "taesd": (re.compile(r"(?P<prefix>(?:.*\.)?taesd_decoder\.)1\.weight"), (4,)),
}
"""For each kind of decoder the name of its first convolution, and how many dimensions its weight may have."""
_DECODER = ("decoder.", "post_quant_conv.", "bn.")
"""How the names of the decoder's half begin."""
_ENCODER = ("encoder.", "quant_conv.", "bn.")
"""How those of the encoder's half begin. FLUX.2's statistics are needed on both ways."""
_ATTENTION = {
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0",
}  # fmt: skip
_LINEAR = re.compile(r".*\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


@dataclass(frozen=True)
class Vae:
    """One VAE in a file: which of the file's tensors it has, and what diffusers calls them."""

    prefix: str
    """What stands before the names of its tensors in the file."""
    preview: bool
    """Whether this is a preview (`AutoencoderTiny`) rather than a full VAE."""
    layout: str
    """Whose names the file uses, in words, for messages."""
    names: Mapping[str, str]
    """Maps diffusers' names of the decoder's tensors to the file's names."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of the tensors by diffusers' names, as diffusers' modules have them (see `linear_shape`)."""
    encoder: Mapping[str, str]
    """Maps diffusers' names of the encoder's tensors to the file's names; empty where the file holds no encoder."""
    encoder_shapes: Mapping[str, tuple[int, ...]]
    """The shapes of the encoder's tensors, as `shapes`."""

    @property
    def frames(self) -> bool:
        """Whether its convolutions have an axis of time, as a video VAE's have, of which single frames are decoded."""
        return len(self.shapes.get(_CONV_IN, ())) == 5


def holds_vae(entries: Mapping[str, Entry]) -> bool:
    """Return whether there is at least one decoder among these tensors."""
    return bool(_decoders(entries))


def find_vae(entries: Mapping[str, Entry], where: str) -> Vae:
    """Find the one VAE among these tensors, by its decoder. Whether there is an encoder too, the result tells.

    Args:
        entries: the tensors of a file by the file's names.
        where: the file, for messages.

    Raises:
        CheckpointError: there is no decoder, or there are several; or two tensors of the file are the same tensor of
            the VAE.
    """
    found = _decoders(entries)
    if not found:
        raise CheckpointError(no_vae(entries, where))
    if len(found) > 1:
        places = ", ".join(f"{prefix}decoder" if kind != "taesd" else prefix.rstrip(".") for kind, prefix in found)
        raise CheckpointError(
            f"checkpoint: {where} holds {len(found)} VAE decoders, {places}; expected one: write the one that is meant "
            "to a file of its own, with safetensors.torch.save_file"
        )
    kind, prefix = found[0]
    if what := stranger(entries, None if kind == "taesd" else prefix):
        raise CheckpointError(f"checkpoint: {where} holds {what}; it is not decoded here: {TAKEN}")
    inside = {name.removeprefix(prefix): name for name in entries if name.startswith(prefix)}
    if kind == "taesd":
        layers = {_taesd_name(name): whole for name, whole in inside.items() if re.match(r"\d+\.", name)}
        other = prefix.replace("taesd_decoder.", "taesd_encoder.")
        layers |= {
            f"encoder.layers.{name.removeprefix(other)}": name
            for name in entries
            if other != prefix and re.match(rf"{re.escape(other)}\d+\.", name)
        }
        return _vae(prefix, True, "taesd.py's", layers, entries)
    if kind == "bare":
        inside = {f"decoder.{name}": whole for name, whole in inside.items()}
    if kind == "preview":
        return _vae(prefix, True, "diffusers'", inside, entries)
    levels = _count(r"decoder\.up\.(\d+)\.", inside, where)
    translate: Callable[[str], str] = functools.partial(diffusers_name, levels=levels)
    if kind == "wan":
        translate = functools.partial(wan.diffusers_name, blocks=wan.blocks_of_a_level(inside))
    elif kind == "full" and len(entries[inside[_CONV_IN]].shape) == 5:
        translate = str  # with an axis of time, these names are diffusers' own; BFL's rules would change some of them
    names: dict[str, str] = {}
    for name, whole in inside.items():
        place = translate(name)
        if place in names and place.startswith((*_DECODER, *_ENCODER)):
            raise CheckpointError(
                f"checkpoint: {where} holds both {names[place]} and {whole}, which are one tensor of the VAE, "
                f"{place}; expected one of them: write the file again"
            )
        names[place] = whole
    layout = "diffusers'"
    if levels:
        layout = "BFL's"
    elif any(re.search(r"\.attentions\.0\.(query|proj_attn)\.", name) for name in inside):
        layout = "diffusers', with its old names of attention"
    if kind == "wan":
        layout = "Wan's"
    if kind == "bare":
        layout += ", the decoder by itself"
    return _vae(prefix, False, layout, names, entries)


def diffusers_name(name: str, levels: int) -> str:
    """Translate the name of a tensor of the encoder or the decoder into diffusers' name for it.

    Args:
        name: the name without its prefix. A name that is diffusers' already comes back as it is.
        levels: how many levels the decoder has. It is needed because BFL counts them from the full resolution down,
            and diffusers from the latents up.
    """

    def upwards(match: re.Match[str]) -> str:
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}."

    name = re.sub(r"^(?:encoder|decoder)\.((?:post_)?quant_conv)\.", r"\1.", name)
    if not name.startswith(("encoder.", "decoder.")):
        return name
    name = re.sub(r"^decoder\.up\.(\d+)\.", upwards, name)
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"_blocks\.(\d+)\.block\.(\d+)\.", r"_blocks.\1.resnets.\2.", name)
    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0.", name)
    name = re.sub(r"^encoder\.down_blocks\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = re.sub(r"\.mid\.attn_1\.", ".mid_block.attentions.0.", name)
    name = re.sub(r"\.nin_shortcut\.", ".conv_shortcut.", name)
    name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
    return re.sub(
        rf"(\.mid_block\.attentions\.0)\.({'|'.join(_ATTENTION)})\.",
        lambda match: f"{match[1]}.{_ATTENTION[match[2]]}.",
        name,
    )


def linear_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that diffusers has for a tensor of this name and shape.

    It differs only for the 1x1 convolutions of attention, ``(out, in, 1, 1)``, which are linear layers in diffusers.
    """
    if _LINEAR.fullmatch(name) and len(shape) > 2 and all(length == 1 for length in shape[2:]):
        return shape[:2]
    return shape


def _decoders(entries: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """Return the kind and the prefix of each decoder among these tensors.

    Besides the kinds of `_FIRST` there are files with only a decoder's own state, whose names do not begin with
    ``decoder.``: kind ``"bare"``, and ``"taesd"`` without a prefix. They are looked for only where nothing else is
    found, because their first names are so common.
    """
    found = [
        (kind, match["prefix"])
        for name in entries
        for kind, (pattern, dimensions) in _FIRST.items()
        if (match := pattern.fullmatch(name)) is not None and len(entries[name].shape) in dimensions
    ]
    if found:
        return found
    for name in entries:
        prefix = name.removesuffix("conv_in.weight")
        if name == f"{prefix}conv_in.weight" and len(entries[name].shape) == 4 and not prefix.endswith("encoder."):
            rest = {other.removeprefix(prefix).split(".")[0] for other in entries if other.startswith(prefix)}
            # A UNet begins with a conv_in too, but it also has down blocks and a time embedding, which a decoder lacks.
            if rest & {"up", "up_blocks"} and not rest & {"down", "down_blocks", "time_embedding", "temb"}:
                found.append(("bare", prefix))
        prefix = name.removesuffix("1.weight")
        if name == f"{prefix}1.weight" and f"{prefix}3.conv.0.weight" in entries and f"{prefix}0.weight" not in entries:
            found.append(("taesd", prefix))
    return found


def _taesd_name(name: str) -> str:
    """Translate a name from taesd.py, which counts the decoder's first clamp as a layer; diffusers does not."""
    index, _, rest = name.partition(".")
    return f"decoder.layers.{int(index) - 1}.{rest}"


def _count(pattern: str, names: Iterable[str], where: str) -> int:
    """Return how many levels the names show, and refuse numbers that do not run from 0 without a gap."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if found != set(range(len(found))) or len(found) > MOST_LEVELS:
        raise CheckpointError(
            f"checkpoint: {where} numbers the decoder's levels {sorted(found)[:9]}; expected 0, 1, 2 and so on, at "
            f"most {MOST_LEVELS} of them: it is damaged or another model's"
        )
    return len(found)


def _vae(
    prefix: str,
    preview: bool,
    layout: str,
    names: Mapping[str, str],
    entries: Mapping[str, Entry],
) -> Vae:
    decoder, encoder = (
        {name: whole for name, whole in names.items() if name.startswith(half)} for half in (_DECODER, _ENCODER)
    )
    if not any(name.startswith("encoder.") for name in encoder):
        encoder = {}
    shapes, encoder_shapes = (
        {name: linear_shape(name, entries[whole].shape) for name, whole in half.items()} for half in (decoder, encoder)
    )
    return Vae(prefix, preview, layout, decoder, shapes, encoder, encoder_shapes)
