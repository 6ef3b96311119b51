"""``fluxvae serve``: Triton and the gateway, started, watched by decoding, restarted, stopped."""
