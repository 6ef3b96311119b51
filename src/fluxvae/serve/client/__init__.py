"""Clients of our Triton models. `fluxvae.client` exports what is public."""
