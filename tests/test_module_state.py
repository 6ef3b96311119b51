"""A VAE that computes something else than its weights say, because of a wrapper, a hook, an adapter and the like.

It is unwrapped where that leaves the function the same, and otherwise refused by name. Each case is made with the real
library, before a decoder is made and after, for a `Decoder` and for `install`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor, FusedAttnProcessor2_0
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.nn.utils import prune

from fluxvae import Decoder, InvalidOptionError, install
from models import random_vae

LATENTS = torch.randn(1, 16, 6, 5, generator=torch.Generator().manual_seed(5))


def _hook(vae: Any) -> None:
    vae.decoder.conv_in.register_forward_hook(lambda module, args, out: out * 2)


def _pre_hook(vae: Any) -> None:
    vae.decoder.up_blocks[0].register_forward_pre_hook(lambda module, args: None)


def _hook_on_the_whole(vae: Any) -> None:
    vae.decoder.register_forward_hook(lambda module, args, out: out)


def _replaced_forward(vae: Any) -> None:
    vae.decoder.mid_block.forward = lambda hidden, *_: hidden


def _seamless(vae: Any) -> None:
    """As web UIs make tiles: a method of the instance pads around the edges."""
    conv = vae.decoder.conv_out

    def circular(self: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        return torch.nn.functional.conv2d(x, weight, bias)

    conv._conv_forward = types.MethodType(circular, conv)


def _padding_mode(vae: Any) -> None:
    vae.decoder.conv_out.padding_mode = "circular"


def _layerwise(vae: Any) -> None:
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _group_offload(vae: Any) -> None:
    vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")


def _sequential_offload(vae: Any) -> None:
    accelerate.cpu_offload(vae, torch.device("cpu"))


def _adapter(vae: Any) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["conv_in"]), vae.decoder)


def _attention_adapter(vae: Any) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), vae.decoder)


def _quantised(vae: Any) -> None:
    torch.ao.quantization.quantize_dynamic(vae.decoder, {torch.nn.Linear}, inplace=True)


class _Quantised(torch.Tensor):
    """As torchao's and bitsandbytes' weights are: tensors of a class of their own."""


def _tensor_subclass(vae: Any) -> None:
    norm = vae.decoder.conv_norm_out
    norm._parameters["weight"] = norm.weight.detach().as_subclass(_Quantised)


def _spectral(vae: Any) -> None:
    torch.nn.utils.parametrizations.spectral_norm(vae.decoder.conv_in)


def _weight_norm(vae: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(vae.decoder.conv_in)


def _pruned(vae: Any) -> None:
    prune.l1_unstructured(vae.decoder.conv_in, "weight", 0.5)


def _meta(vae: Any) -> None:
    vae.decoder.up_blocks[1].resnets[0].conv1.to("meta")


def _all_meta(vae: Any) -> None:
    vae.to("meta")


def _part_half(vae: Any) -> None:
    vae.decoder.mid_block.to(torch.bfloat16)


def _decoder_half(vae: Any) -> None:
    vae.decoder.to(torch.bfloat16)


def _eight_bits(vae: Any) -> None:
    vae.to(torch.float8_e4m3fn)


def _subclass(vae: Any) -> None:
    class Louder(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    vae.decoder.conv_out.__class__ = Louder


def _same_name(vae: Any) -> None:
    vae.decoder.conv_out.__class__ = type("Conv2d", (torch.nn.Conv2d,), {"forward": lambda self, x: x})


def _processor(vae: Any) -> None:
    class Own(AttnProcessor):  # type: ignore[misc]
        """Somebody's."""

    vae.decoder.mid_block.attentions[0].set_processor(Own())


def _fused_and_changed(vae: Any) -> None:
    vae.fuse_qkv_projections()
    with torch.no_grad():
        vae.decoder.mid_block.attentions[0].to_qkv.weight.mul_(2)


DONE: dict[Callable[[Any], None], str] = {
    _hook: r"decoder\.conv_in has a forward hook \(.*_hook.*\)",
    _pre_hook: r"decoder\.up_blocks\.0 has a forward pre-hook",
    _hook_on_the_whole: r"decoder has a forward hook",
    _replaced_forward: r"decoder\.mid_block\.forward has been replaced, by .*_replaced_forward",
    _seamless: r"decoder\.conv_out\._conv_forward has been replaced",
    _padding_mode: r"cannot read decoder\.conv_out",
    _layerwise: r"decoder\..* has been replaced, by diffusers' layerwise casting",
    _group_offload: r"has been replaced, by diffusers' .*group.offload",
    _sequential_offload: r"accelerate's AlignDevicesHook",
    _adapter: r"cannot read decoder\.conv_in \(Conv2d\)",
    _attention_adapter: r"cannot read decoder\.mid_block\.attentions\.0\.to_q \(Linear\)",
    _quantised: r"cannot read decoder\.mid_block\.attentions\.0\.to_q",
    _tensor_subclass: r"decoder\.conv_norm_out\.weight is a _Quantised",
    _spectral: r"decoder\.conv_in",
    _weight_norm: r"decoder\.conv_in",
    _pruned: r"decoder\.conv_in has a forward pre-hook",
    _meta: r"up_blocks\.1\.resnets\.0\.conv1 are on the meta device",
    _all_meta: r"on the meta device",
    _part_half: r"decoder\.mid_block\..* is bfloat16 on cpu, the weights before it are float32 on cpu",
    _decoder_half: r"it says float32 on cpu, but decoder\.conv_in\.weight is bfloat16|before it are",
    _eight_bits: r"float8_e4m3fn on cpu, in which nothing can be computed",
    _subclass: r"cannot read decoder\.conv_out \(Louder\)",
    _same_name: r"cannot read decoder\.conv_out \(Conv2d\)",
    _processor: r"attentions\.0 has the attention processor .*Own",
    _fused_and_changed: r"to_qkv, the fused projection, is not to_q, to_k and to_v",
}
each = pytest.mark.parametrize("do", DONE, ids=lambda do: do.__name__.strip("_"))


@each
def test_it_is_refused_before_a_decoder_is_made(do: Callable[[Any], None]) -> None:
    vae = random_vae()
    do(vae)
    with pytest.raises(InvalidOptionError, match=DONE[do]):
        Decoder(vae)
    with pytest.raises(InvalidOptionError, match=DONE[do]):
        install(vae)


@each
def test_it_is_refused_when_it_comes_later(do: Callable[[Any], None]) -> None:
    vae = random_vae()
    decoder = Decoder(vae)
    decoder.decode_raw(LATENTS)
    do(vae)
    with pytest.raises(InvalidOptionError, match=DONE[do]):
        decoder.decode_raw(LATENTS)
    with pytest.raises(InvalidOptionError, match=DONE[do]):
        decoder.engine.plan(6, 5)


@each
def test_it_is_refused_by_what_was_installed(do: Callable[[Any], None]) -> None:
    vae = random_vae()
    install(vae)
    do(vae)
    with torch.no_grad(), pytest.raises(InvalidOptionError, match=DONE[do]):
        vae.decode(LATENTS)


@pytest.mark.parametrize("do", [_hook, _seamless, _layerwise, _group_offload, _adapter, _part_half, _processor])
def test_diffusers_itself_decodes_it_as_it_does(do: Callable[[Any], None]) -> None:
    """The reference engine runs the modules: what was done to them is honoured, or fails as it does in diffusers."""
    vae = random_vae()
    do(vae)
    decoder = Decoder(vae, engine="diffusers")
    raw = decoder.format.to_raw(LATENTS)
    try:
        expected = vae.decode(raw, return_dict=False)[0]
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:20])):
            decoder.decode_raw(LATENTS)
    else:
        assert torch.equal(decoder.decode_raw(LATENTS), expected)


def _compiled_submodule(vae: Any) -> Any:
    vae.decoder.mid_block = torch.compile(vae.decoder.mid_block)
    vae.decoder.conv_in = torch.compile(vae.decoder.conv_in)
    return vae


def _compiled_decoder(vae: Any) -> Any:
    vae.decoder = torch.compile(vae.decoder)
    return vae


def _compiled_in_place(vae: Any) -> Any:
    vae.decoder.compile()
    return vae


def _compiled_methods(vae: Any) -> Any:
    vae.decode = torch.compile(vae.decode)
    vae.decoder.forward = torch.compile(vae.decoder.forward)
    return vae


def _removed_offload(vae: Any) -> Any:
    accelerate.cpu_offload(vae, torch.device("cpu"))
    accelerate.hooks.remove_hook_from_submodules(vae)
    return vae


def _removed_hook(vae: Any) -> Any:
    vae.decoder.conv_in.register_forward_hook(lambda *_: None).remove()
    return vae


def _fused(vae: Any) -> Any:
    vae.fuse_qkv_projections()
    assert isinstance(vae.decoder.mid_block.attentions[0].processor, FusedAttnProcessor2_0)
    return vae


def _slow_attention(vae: Any) -> Any:
    vae.set_attn_processor(AttnProcessor())
    return vae


def _model_offload(vae: Any) -> Any:
    accelerate.cpu_offload_with_hook(vae, torch.device("cpu"))
    return vae


def _no_encoder(vae: Any) -> Any:
    vae.encoder = None
    return vae


@pytest.mark.parametrize(
    "do",
    [
        torch.compile, _compiled_submodule, _compiled_decoder, _compiled_in_place, _compiled_methods, _removed_offload,
        _removed_hook, _fused, _slow_attention, _model_offload, _no_encoder,
    ],
)  # fmt: skip
def test_what_computes_the_same_is_decoded(do: Callable[[Any], Any]) -> None:
    expected = Decoder(random_vae()).decode_raw(LATENTS)
    vae = random_vae()
    later = Decoder(vae)
    done = do(vae)
    assert torch.equal(Decoder(done).decode_raw(LATENTS), expected)
    assert torch.equal(later.decode_raw(LATENTS), expected)
    with install(done):
        raw = later.format.to_raw(LATENTS)
        assert torch.equal(vae.decode(raw).sample, expected)


def test_weights_that_change_and_modules_that_are_exchanged_are_those_of_the_next_decode() -> None:
    vae, other = random_vae(), random_vae(seed=1)
    decoder = Decoder(vae)
    decoder.decode_raw(LATENTS)
    vae.decoder = other.decoder
    vae.post_quant_conv = other.post_quant_conv
    assert torch.equal(decoder.decode_raw(LATENTS), Decoder(other).decode_raw(LATENTS))


@pytest.fixture
def global_hook() -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: out)
    yield
    handle.remove()


@pytest.mark.usefixtures("global_hook")
def test_a_hook_on_every_module_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="a hook on every module's forward"):
        Decoder(random_vae())


def test_a_method_of_pytorchs_class_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(random_vae())
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: x)
    with pytest.raises(InvalidOptionError, match=r"Conv2d\.forward, of .*, has been replaced"):
        decoder.decode_raw(LATENTS)


def test_a_replaced_decode_is_refused_and_our_own_is_not() -> None:
    vae = random_vae()
    decoder = Decoder(vae)
    expected = decoder.decode_raw(LATENTS)
    with install(vae):
        assert torch.equal(decoder.decode_raw(LATENTS), expected)
        with pytest.raises(InvalidOptionError, match=r"fluxvae\.install has put the exact engine into it"):
            Decoder(vae, engine="diffusers")
    vae.decode = lambda *_, **__: None
    with pytest.raises(InvalidOptionError, match="its decode has been replaced"):
        decoder.decode_raw(LATENTS)


def test_a_class_of_somebodys_own_is_refused() -> None:
    class Own(AutoencoderKL):  # type: ignore[misc]
        def _decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
            return DecoderOutput(sample=2 * z) if return_dict else (2 * z,)

    vae = random_vae()
    vae.__class__ = Own
    with pytest.raises(InvalidOptionError, match="_decode"):
        Decoder(vae)
    assert Decoder(vae, engine="diffusers").decode_raw(LATENTS).shape[1] == 16


def test_naming_a_dtype_casts_all_of_it() -> None:
    vae = random_vae()
    expected = Decoder(vae).decode_raw(LATENTS)
    vae.decoder.mid_block.to(torch.float64)
    assert torch.equal(Decoder(vae, dtype="float32").decode_raw(LATENTS), expected)
