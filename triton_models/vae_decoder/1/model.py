"""The file that Triton loads: the model is `fluxvae.serve.model.triton_model`, its settings are in ``config.pbtxt``.

Run as a script (``uv run triton_models/vae_decoder/1/model.py``), it shows the demo, without Triton.
"""

from fluxvae.serve.model.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]

if __name__ == "__main__":
    from fluxvae.demo import main

    raise SystemExit(main())
