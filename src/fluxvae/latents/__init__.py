"""Latents: their packing, the layouts they come in, how they become raw latents, and the checks of all that.

- `packing`: tokens to latent images and back, as pure functions.
- `format`: how the latents of one checkpoint become raw latents.
- `layout`: what a shape of latents means.
- `checks`: what is refused by the shape, the size and the options alone, without PyTorch.
- `values`: what is refused by looking at the tensor.
"""
