"""Engines: raw latents to pixels. `exact` decodes in strips within a memory limit, `reference` is diffusers itself."""
