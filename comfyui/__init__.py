"""fluxvae's nodes for ComfyUI: a VAE that decodes and encodes exactly within a memory limit, here or on a server."""

from comfy_api.latest import ComfyExtension

from .nodes import ExactVAENode, RemoteVAENode

__all__ = ["comfy_entrypoint"]


class FluxvaeExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self):
        """Return the nodes of this pack."""
        return [ExactVAENode, RemoteVAENode]


async def comfy_entrypoint() -> FluxvaeExtension:
    """Return the extension; ComfyUI calls this when it loads the pack."""
    return FluxvaeExtension()
