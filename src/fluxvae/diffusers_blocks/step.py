"""`VaeStep`: a step of a modular pipeline that runs one of diffusers' own steps with another VAE."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks

from fluxvae.errors import InvalidOptionError
from fluxvae.options import FULL_CLASSES

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["VaeStep", "uses_vae"]


class VaeStep(ModularPipelineBlocks):  # type: ignore[misc]
    """One of diffusers' steps that decode or encode, with another VAE than the pipeline's. Subclasses say with which.

    Args:
        step: the step, such as ``Flux2DecodeStep()``.

    Raises:
        InvalidOptionError: it is no step that uses a VAE, or its VAE is of a class that fluxvae does not know.
    """

    def __init__(self, step: ModularPipelineBlocks) -> None:
        super().__init__()
        _check_step(step)
        self.step = step
        """diffusers' own step."""
        self.model_name = step.model_name
        self._requirements = step._requirements

    @classmethod
    def replace_all(cls, blocks: ModularPipelineBlocks, *args: Any, **options: Any) -> ModularPipelineBlocks:
        """Return a copy of ``blocks`` in which every step that uses the component ``vae`` is one of this class.

        ``blocks`` itself stays as it is: diffusers keeps one instance of most inner blocks for all pipelines of a
        family, so a change to it would reach pipelines of others too.

        Args:
            blocks: a tree of blocks such as ``Flux2AutoBlocks()`` or ``pipe.blocks``, or a single step. Steps of
                fluxvae in it are replaced as well.
            args, options: for the class, after the step.

        Raises:
            InvalidOptionError: an option is wrong, no step uses a VAE, or one uses a VAE that fluxvae does not know.
        """
        if not isinstance(blocks, ModularPipelineBlocks):
            raise InvalidOptionError(f"blocks: got {_shown(blocks)}, expected blocks, such as Flux2AutoBlocks()")
        made: list[Self] = []

        def replaced(block: ModularPipelineBlocks) -> ModularPipelineBlocks:
            if isinstance(block, VaeStep):
                block = block.step
            for name, inner in block.sub_blocks.items():
                block.sub_blocks[name] = replaced(inner)
            if block.sub_blocks or not uses_vae(block):
                return block
            made.append(cls(block, *args, **options))
            return made[-1]

        found = replaced(copy.deepcopy(blocks))
        if not made:
            raise InvalidOptionError(
                f"blocks: got {type(blocks).__name__}, in which no step uses the component vae; expected the blocks "
                "that decode or encode"
            )
        return found

    @abstractmethod
    def vae_for(self, components: Any) -> Any:
        """Return what the step is to see as ``components.vae`` in this call."""

    def close(self, vae: Any) -> None:
        """Let go of what `vae_for` returned, after the call."""

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Run the step with a pipeline that differs from ``components`` in its VAE alone."""
        vae = self.vae_for(components)
        try:
            seen = copy.copy(components)
            seen.__dict__["vae"] = vae  # setattr would tell the pipeline's config of it
            _, state = self.step(seen, state)
        finally:
            self.close(vae)
        return components, state

    @property
    def description(self) -> str:
        return f"{self.step.description} ({type(self).__name__} of fluxvae)"

    @property
    def expected_components(self) -> list[Any]:
        return list(self.step.expected_components)

    @property
    def expected_configs(self) -> list[Any]:
        return list(self.step.expected_configs)

    @property
    def inputs(self) -> list[Any]:
        return list(self.step.inputs)

    @property
    def intermediate_outputs(self) -> list[Any]:
        return list(self.step.intermediate_outputs)


def uses_vae(block: ModularPipelineBlocks) -> bool:
    """Return whether a block asks for the component ``vae``."""
    return any(spec.name == "vae" for spec in block.expected_components)


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _check_step(step: object) -> None:
    if not isinstance(step, ModularPipelineBlocks):
        call = f"; make a step of it: {step.__name__}()" if isinstance(step, type) else ""
        raise InvalidOptionError(f"step: got {_shown(step)}, expected a step, such as Flux2DecodeStep(){call}")
    name = type(step).__name__
    if isinstance(step, VaeStep):
        raise InvalidOptionError(f"step: got a {name}, which is fluxvae's already; give it diffusers' own step")
    if step.sub_blocks:
        raise InvalidOptionError(
            f"step: got {name}, which holds other blocks; expected one step: replace_all(blocks) finds those with a VAE"
        )
    vae = next((spec.type_hint for spec in step.expected_components if spec.name == "vae"), None)
    if vae is None:
        raise InvalidOptionError(f"step: got {name}, which uses no component vae; expected one that decodes or encodes")
    if not any(kind.__name__ in FULL_CLASSES for kind in vae.__mro__):
        raise InvalidOptionError(
            f"step: got {name}, whose vae is {vae.__name__}; fluxvae knows {', '.join(FULL_CLASSES)}: leave diffusers' "
            "own step where it is"
        )
