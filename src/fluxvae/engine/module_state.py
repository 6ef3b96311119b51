"""What has been done to a VAE's modules besides loading weights: compiled, hooked, offloaded, quantised, cast.

The exact engine computes with a module's weights and never calls the module. If something changed what that call
computes, the engine would not notice, and the image would silently be another model's. So whatever only wraps the same
function is unwrapped (`unwrapped`), and everything else is refused (`check_modules`). All of it can also happen after a
decoder was made, so an engine looks before every decode, which takes a millisecond or two. Only the half of the model
that an engine uses is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch

from fluxvae.devices import EXACT
from fluxvae.engine.layers.reading import OWN, is_of, unwrapped
from fluxvae.engine.way import DECODE, Way
from fluxvae.errors import InvalidOptionError

__all__ = ["changed_calls", "changed_methods", "check_loaded", "check_modules", "check_not_installed"]

_INSTEAD = "or let diffusers itself compute it (engine='diffusers', or without fluxvae.install)"
_PLAIN = (torch.nn.Parameter, torch.Tensor)
_USUAL = torch.nn.Module().__dict__.keys()
"""The names that every module has in its own dictionary, none of which is a method."""
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PROCESSORS = frozenset(
    {"AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}
)
"""diffusers' own ways to compute the same attention, from its ``attention_processor.py``."""


def check_loaded(vae: torch.nn.Module, way: Way = DECODE) -> None:
    """Refuse a VAE that has weights on the meta device in the half that goes ``way``.

    Raises:
        InvalidOptionError: naming the first of them, and what put it there where that can be told.
    """
    for name, module in _modules(vae, way.parts):
        if any(held is not None and held.is_meta for held in (*module._parameters.values(), *module._buffers.values())):
            cause = _hook_of(module) or "nothing has loaded them, or something took them away"
            _refuse(
                f"the weights of {name} are on the meta device, which holds no values: {cause}",
                "Load them, or use pipe.enable_model_cpu_offload(), which moves the VAE as a whole",
                instead=False,
            )


def check_not_installed(vae: torch.nn.Module, way: Way = DECODE) -> None:
    """Refuse a VAE into which `fluxvae.install` has put the exact engine, for an engine that is diffusers' own.

    Raises:
        InvalidOptionError: what ``vae.decode``, or ``vae.encode``, computes is not what diffusers would.
    """
    if getattr(vae.__dict__.get(f"_{way.name}"), "__module__", "") == "fluxvae.install":
        _refuse(
            "fluxvae.install has put the exact engine into it, so engine='diffusers' would not be diffusers",
            "Call remove() on the handle of the install, or use engine='exact'",
            instead=False,
        )


def check_modules(vae: torch.nn.Module, way: Way = DECODE) -> None:
    """Refuse whatever makes the half of this VAE that goes ``way`` compute something else than its weights say.

    Raises:
        InvalidOptionError: a hook, a replaced method, an attention of another kind, a tensor that is no plain one,
            that is of another dtype or device than the rest, or that is on a device for which the engine has no
            kernels (``mps``, ``xpu`` and others); it names what was found, where, and what to do.
    """
    for root in (way.name, f"_{way.name}"):
        if (found := _replaced(vae, root)) and getattr(found, "__module__", "") != "fluxvae.install":
            _refuse(f"its {root} has been replaced ({_words(found)})", "Undo that")
        own = getattr(type(vae), root, None)
        if own is not None and not _definer(type(vae), root).__module__.startswith(OWN):
            _refuse(f"its {root} is that of {_words(type(vae))}", "Load diffusers' own class")
    for what, do in changed_calls(vae, way.parts):
        _refuse(what, do)
    for name, module in _modules(vae, way.parts):
        if unwrapped(module) is module:
            _check_attention(name, module)
    _check_tensors(vae, way)


def changed_calls(vae: torch.nn.Module, parts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Find the hooks and replaced methods on these parts of a VAE, whichever program has made its modules.

    Args:
        vae: the whole VAE. What has been done to the VAE itself is not looked for.
        parts: the names of its modules that are looked at, with all that is in them.

    Yields:
        What was found and where, and what to do about it, in words.
    """
    for scope in (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks):
        for hook in scope.values():
            yield f"there is a hook on every module's forward ({_words(hook)})", "Remove it"
    kinds: dict[type, str] = {}
    for name, module in _modules(vae, parts):
        yield from _hooks(name, module)
        if unwrapped(module) is module:
            kinds.setdefault(type(module), name)
            yield from _replaced_methods(name, module)
    for kind, name in kinds.items():
        yield from _replaced_of_class(name, kind)


def changed_methods(vae: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Find the replaced methods of another program's VAE itself, not of its parts. It yields what `changed_calls` does.

    Of diffusers' VAE `check_modules` looks at the one method that is used, since `fluxvae.install` may replace it.
    """
    yield from _replaced_methods(type(vae).__name__, vae)
    yield from _replaced_of_class("the VAE", type(vae))


def _hooks(name: str, module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    for kind, hooks in (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks)):
        for hook in hooks.values():
            yield f"{name} has a forward {kind} ({_words(hook)})", "Remove it (the handle's remove())"


def _replaced_methods(name: str, module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    for method in module.__dict__.keys() - _USUAL:
        if found := _replaced(module, method):
            yield f"{name}.{method} has been replaced, by {_hook_of(module) or _words(found)}", _advice(module)


def _replaced_of_class(name: str, kind: type) -> Iterator[tuple[str, str]]:
    for method in ("forward", "_conv_forward", "decode", "encode"):
        made = getattr(kind, method, None)
        if made is not None and made.__module__ != _definer(kind, method).__module__:
            yield f"{kind.__name__}.{method}, of {name}, has been replaced ({_words(made)})", "Undo that"


def _replaced(module: torch.nn.Module, method: str) -> Any:
    """The attribute of the instance that is called in place of its class's method of this name; None if there is none.

    An attribute that is the method itself does not count, because hooks leave that behind when they are removed. Nor
    does what ``torch.compile(module.forward)`` made, because it only wraps the method.
    """
    own = getattr(type(module), method, None)
    if method not in module.__dict__ or not callable(own):
        return None
    found = module.__dict__[method]
    while hasattr(found, "_torchdynamo_orig_callable"):
        found = found._torchdynamo_orig_callable
    if getattr(found, "__func__", None) is own and found.__self__ is module:
        return None
    return found


def _definer(kind: type, method: str) -> type:
    return next(one for one in kind.__mro__ if method in vars(one))


def _check_attention(name: str, module: Any) -> None:
    if not is_of(module, "Attention"):
        return
    kind = type(module.processor)
    if kind.__name__ not in _PROCESSORS or not kind.__module__.startswith("diffusers."):
        _refuse(
            f"{name} has the attention processor {kind.__module__}.{kind.__qualname__}",
            "Set diffusers' own (vae.set_default_attn_processor())",
        )
    if kind.__name__ == "FusedAttnProcessor2_0":
        apart = (module.to_q, module.to_k, module.to_v)
        for part in ("weight", "bias"):
            whole = getattr(module.to_qkv, part)
            pieces = [getattr(one, part) for one in apart]
            if (whole is None) != (pieces[0] is None) or (
                whole is not None and not torch.equal(whole, torch.cat(pieces))
            ):
                _refuse(
                    f"{name}.to_qkv, the fused projection, is not to_q, to_k and to_v, of which the engine reads",
                    "Call vae.unfuse_qkv_projections()",
                )


def _check_tensors(vae: Any, way: Way) -> None:
    first: torch.Tensor | None = None
    for name, tensor in _tensors(vae, way):
        if tensor.is_meta:
            check_loaded(vae, way)  # says why, where it can be told
        if tensor.device.type not in EXACT:
            _refuse(
                f"{name} is on {tensor.device}, and the exact engine computes on a CPU and on NVIDIA's and AMD's GPUs",
                f"Move the VAE to the CPU (vae.to('cpu')), {_INSTEAD}",
                instead=False,
            )
        if type(tensor) not in _PLAIN:
            _refuse(f"{name} is a {type(tensor).__name__}, quantised or sharded", "Load plain weights")
        if tensor.layout != torch.strided:
            _refuse(f"{name} is {str(tensor.layout).removeprefix('torch.')}", "Make it dense")
        if first is None:
            first = tensor
            if first.dtype not in _COMPUTED:
                _refuse(
                    f"{name} is {_at(first.dtype, first.device)}, in which nothing can be computed",
                    "Cast the VAE (dtype='float32' or 'bfloat16')",
                )
            if (vae.dtype, vae.device) != (first.dtype, first.device):
                _refuse(
                    f"it says {_at(vae.dtype, vae.device)}, but {name} is {_at(first.dtype, first.device)}",
                    "Move or cast all of it with vae.to(...)",
                )
        elif (tensor.dtype, tensor.device) != (first.dtype, first.device):
            _refuse(
                f"{name} is {_at(tensor.dtype, tensor.device)}, the weights before it are "
                f"{_at(first.dtype, first.device)}",
                "Move or cast all of it with vae.to(...)",
            )


def _parts(vae: Any, parts: Iterable[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    for name in parts:
        part = getattr(vae, name, None)
        if isinstance(part, torch.nn.Module):
            yield name, part


def _modules(vae: Any, parts: Iterable[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    for prefix, part in _parts(vae, parts):
        for name, module in part.named_modules(prefix=prefix):
            yield _shown(name), module


def _tensors(vae: Any, way: Way) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in _modules(vae, way.parts):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name}.{key}", tensor


def _shown(name: str) -> str:
    return name.replace("._orig_mod", "")


def _hook_of(module: Any) -> str:
    """What a library has put on a module to offload or cast it, in words; "" if there is nothing."""
    if (registry := module.__dict__.get("_diffusers_hook")) is not None and getattr(registry, "hooks", None):
        return "diffusers' " + " and ".join(name.replace("_", " ") for name in registry.hooks)
    if (hook := module.__dict__.get("_hf_hook")) is not None:
        return f"accelerate's {type(hook).__name__}, which offloads one module after another"
    return ""


def _advice(module: Any) -> str:
    if "_diffusers_hook" in module.__dict__:
        return "Load the VAE without casting or offloading its layers (pipe.enable_model_cpu_offload() is honoured)"
    if "_hf_hook" in module.__dict__:
        return "Use pipe.enable_model_cpu_offload(), which moves the VAE as a whole"
    return "Undo that"


def _at(dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"


def _words(function: Any) -> str:
    function = getattr(function, "func", function)  # of a functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"


def _refuse(what: str, do: str, *, instead: bool = True) -> NoReturn:
    raise InvalidOptionError(
        f"vae: {what}. The exact engine computes with the weights alone and would pass it over. {do}, {_INSTEAD}"
        if instead
        else f"vae: {what}. {do}"
    )
