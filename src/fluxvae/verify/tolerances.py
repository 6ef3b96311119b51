"""Every tolerance of the project, each beside the measured value that it was set by.

The tests, the demo and the benchmarks read their bounds here. A bound is set once, from a measurement, and then kept; a
commit that loosens one must give a reason. Where a contract says *identical*, there is no tolerance, and so nothing
stands here.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "AMX_PRODUCTS",
    "CAUSAL_ERROR_RATIO",
    "COMFYUI_LATENTS",
    "CUDA_ATTENTION",
    "CUDA_PASS",
    "CUDA_STATISTICS",
    "ENCODER_ERROR_RATIO",
    "ENGINE_ERROR_RATIO",
    "ENGINE_FLOAT64_ERROR",
    "EXACT_VS_REFERENCE_CHANGED",
    "EXACT_VS_REFERENCE_CHANGED_FULL",
    "EXACT_VS_REFERENCE_LEVELS",
    "PEAK_PREDICTION",
    "PREVIEW_PEAK",
    "PRODUCTS",
    "THERE_AND_BACK",
    "WINOGRAD_ATTENTION",
    "WINOGRAD_CHANGED",
    "WINOGRAD_CONV",
    "WINOGRAD_ENCODER_RATIO",
    "WINOGRAD_LAST",
    "WINOGRAD_LEVELS",
    "WINOGRAD_PRECISE",
    "WINOGRAD_SILU",
    "WINOGRAD_STATISTICS",
    "Tolerance",
]


class Tolerance(NamedTuple):
    """One bound, what it bounds, and the measurement that it comes from."""

    bound: float
    measured: float
    """The worst value that was seen when the bound was set; NaN where nothing was measured yet."""
    what: str
    """What is bounded, in words, with its unit."""


EXACT_VS_REFERENCE_LEVELS = {
    "float32": Tolerance(1, 1, "largest difference in uint8 levels between the exact engine and diffusers"),
    "bfloat16": Tolerance(16, float("nan"), "the same in bfloat16, not measured yet"),
    "float16": Tolerance(2, float("nan"), "the same in float16, not measured yet"),
}

EXACT_VS_REFERENCE_CHANGED = Tolerance(1e-3, 2e-5, "share of uint8 values that differ from diffusers' in float32")

EXACT_VS_REFERENCE_CHANGED_FULL = Tolerance(
    1.2e-2,
    5.9e-3,
    "the same at 1024 pixels with FLUX's widths and random weights: nearly all of it is diffusers' own error, whose "
    "channels-last convolutions sum in one chain (docs/notebook.md)",
)

ENGINE_FLOAT64_ERROR = Tolerance(1e-11, 4e-14, "largest float64 difference to diffusers, relative to the largest pixel")

ENGINE_ERROR_RATIO = {
    "float32": Tolerance(1.0, 0.943, "rms error against float64 with direct kernels, divided by diffusers' own"),
    "float32 in small maps without AVX-512": Tolerance(1.4, 1.19, "there PyTorch convolves them by matrix products"),
    "bfloat16": Tolerance(1.0, 0.909, "the same in bfloat16"),
    "float16": Tolerance(1.05, 0.95, "the same in float16, over few pixels"),
}

ENCODER_ERROR_RATIO = {
    "float32": Tolerance(1.0, 0.87, "the same of an encoder's mean, and of its log variance"),
    "bfloat16": Tolerance(1.0, 0.89, "the same in bfloat16"),
}

CAUSAL_ERROR_RATIO = {
    "float32": Tolerance(
        1.2,
        1.12,
        "the same of either half of a narrow causal network, which diffusers convolves in three dimensions: with 16 "
        "channels PyTorch rounds that to three quarters of the error; with 96 the ratio is 0.91",
    ),
    "bfloat16": Tolerance(1.0, 0.9, "the same in bfloat16"),
}

THERE_AND_BACK = Tolerance(
    0.02,
    1.6e-4,
    "dB by which a picture that was encoded and decoded differs in PSNR from diffusers' on the same weights",
)

COMFYUI_LATENTS = Tolerance(
    3e-4, 5.9e-5, "largest difference of latents that ComfyUI's own VAE and fluxvae's node encode, full widths, random"
)

PRODUCTS = Tolerance(2e-7, 1.3e-7, "rms error of sums of 512 products by fused multiply-adds, relative to their rms")
AMX_PRODUCTS = Tolerance(1.3e-7, 8.7e-8, "the same by AMX, of three bfloat16 parts each")
WINOGRAD_CONV = Tolerance(2e-4, 2.7e-5, "largest error of one Winograd convolution of values of unit variance")
WINOGRAD_PRECISE = Tolerance(2e-5, 3.5e-6, "the same where the convolution is precise, or of stride 2")
WINOGRAD_ENCODER_RATIO = Tolerance(
    5.0, 3.8, "rms error of an encoder's mean or log variance with Winograd kernels, divided by diffusers' own"
)
WINOGRAD_LAST = Tolerance(2e-6, 4e-7, "the same of the last layer, which is a direct convolution")
WINOGRAD_ATTENTION = Tolerance(4e-6, 1e-6, "largest error of attention, relative to the largest value it averages")
WINOGRAD_STATISTICS = Tolerance(1e-5, 1.3e-6, "error of a block's mean, and relative error of its squared deviations")
WINOGRAD_SILU = Tolerance(4, 2.61, "error of SiLU in units of 2**-24 of its value")
WINOGRAD_CHANGED = Tolerance(1e-3, 4.1e-4, "share of uint8 values that Winograd kernels change from a float64 decode")
WINOGRAD_LEVELS = Tolerance(1, 1, "largest difference in uint8 levels between Winograd kernels and a float64 decode")

CUDA_PASS = Tolerance(4, 1.8, "error of a pass between convolutions in the interpreter, in units of the last place")
CUDA_STATISTICS = Tolerance(
    5e-5, 1.7e-5, "error of a block's mean and squared deviations, relative, of values 300 times their spread"
)
CUDA_ATTENTION = {
    "float32": Tolerance(60, 20, "error of attention, in units of the last place, for scores up to 60"),
    "bfloat16": Tolerance(2, 0.5, "the same in bfloat16"),
    "float16": Tolerance(2, 0.5, "the same in float16"),
}

PEAK_PREDICTION = Tolerance(
    0.04, 0.022, "how far a peak may lie below the predicted one, as a share of it, the runtime's allowance apart"
)
PREVIEW_PEAK = Tolerance(0.15, 0.105, "how far a preview's peak may lie below the predicted one, from 512 pixels on")
