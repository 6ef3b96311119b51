"""The file that Triton loads: the model is `fluxvae.serve.model.triton_model`, its settings are in ``config.pbtxt``."""

from fluxvae.serve.model.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
