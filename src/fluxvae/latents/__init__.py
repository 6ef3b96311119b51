"""Latents: their layouts, how they become raw latents, and one value that carries them with all that is said of them.

- `packing`: tokens to latent images and back, as pure functions.
- `reading`: what a caller says about how latents are to be read, as one value.
- `format`: how the latents of one checkpoint become raw latents.
- `layout`: what a shape of latents means.
- `checks`: what is refused by shape, size and options alone, without PyTorch.
- `values`: what is refused by looking at the tensor.
- `request`: latents and their reading, checked against a format; this is what a decoder decodes.

Each of them imports only from those above it.
"""
