"""The Triton model: requests of one ``execute`` to a `fluxvae.Decoder` and back. The logic is in ``fluxvae.serve``.

Run as a script (``uv run triton_models/vae_decoder/1/model.py``) it is the demo, without Triton.
"""

from __future__ import annotations

import gc
import json
import os
import traceback
import uuid
from typing import Any

import numpy as np
import torch

from fluxvae import Decoder, FluxVAEError
from fluxvae.images import encode, postprocess
from fluxvae.serve.requests import Job, answer, code_of, read_job
from fluxvae.serve.startup import Settings, check_tensor_exchange

try:
    import triton_python_backend_utils as pb_utils
except ImportError:  # it exists only inside Triton; the demo runs without
    pb_utils = None


class TritonPythonModel:
    """Triton makes one of these in a process of its own for each instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint, or keep the model from becoming ready with a message that says why."""
        try:
            check_tensor_exchange(pb_utils)
            self.settings = Settings.read(
                json.loads(args["model_config"]).get("parameters", {}),
                os.environ,
                kind=args["model_instance_kind"],
                device_id=args["model_instance_device_id"],
            )
            if self.settings.threads is not None:
                torch.set_num_threads(self.settings.threads)
            self.decoder = Decoder.from_pretrained(self.settings.checkpoint, **self.settings.decoder_options())
        except FluxVAEError as error:
            raise pb_utils.TritonModelException(f"{type(error).__name__}: {error}") from None
        pb_utils.Logger.log_info(
            f"fluxvae: {args['model_instance_name']} serves {self.settings.checkpoint} on {self.decoder.device} "
            f"in {self.decoder.dtype}"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request: with its images, or with an error of its own."""
        responses: list[Any] = [None] * len(requests)
        jobs = []
        for index, request in enumerate(requests):
            try:
                jobs.append(self._read(index, request))
            except Exception as error:  # answered; an unexpected one is logged
                responses[index] = _failure(request, error)

        def respond(job: Job, outcome: torch.Tensor | Exception) -> None:
            request = requests[job.index]
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                tensors = _outputs(job, outcome, request.requested_output_names())
                responses[job.index] = pb_utils.InferenceResponse(output_tensors=tensors)
            except Exception as error:  # answered; an unexpected one is logged
                responses[job.index] = _failure(request, error)

        try:
            answer(
                self.decoder,
                jobs,
                respond,
                max_pixels=self.settings.max_pixels,
                cancelled=lambda job: bool(requests[job.index].is_cancelled()),
            )
        except Exception as error:  # whatever went wrong, nobody is left without an answer
            for index, response in enumerate(responses):
                if response is None:
                    responses[index] = _failure(requests[index], error)
        return responses

    def finalize(self) -> None:
        """Free the weights, on the GPU too."""
        self.decoder = None  # type: ignore[assignment]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _read(self, index: int, request: Any) -> Job:
        latents, heights, widths = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("latents", "height", "width")
        )
        return read_job(
            index,
            latents,
            heights,
            widths,
            request.parameters(),
            decoder=self.decoder,
            max_pixels=self.settings.max_pixels,
        )


def _outputs(job: Job, image: torch.Tensor, names: set[str]) -> list[Any]:
    """The output tensors that were asked for, from (B, 3, H, W) in about [-1, 1]."""
    arrays: dict[str, Any] = {}
    if names & {"images", "images_encoded"}:
        pixels = postprocess(image, "uint8")
        if "images" in names:
            arrays["images"] = pixels
        if "images_encoded" in names:
            files = [[encode(one, job.parameters.format, job.parameters.quality)] for one in pixels]
            arrays["images_encoded"] = np.array(files, dtype=np.object_)
    if "images_np" in names:
        arrays["images_np"] = postprocess(image, "np")
    if "images_pt" in names:
        arrays["images_pt"] = postprocess(image, "pt").float().cpu().numpy()  # Triton has no bfloat16 for NumPy
    return [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in arrays.items()]


def _failure(request: Any, error: Exception) -> Any:
    """An error response; what was not meant for clients goes to the log under an id, not over the wire."""
    code, message = code_of(error), str(error)
    if not isinstance(error, FluxVAEError):
        reference = request.request_id() or uuid.uuid4().hex[:12]
        trace = "".join(traceback.format_exception(error))
        pb_utils.Logger.log_error(f"fluxvae: request {reference} failed: {trace}")
        kind = "out of memory" if code == "UNAVAILABLE" else "internal error"
        message = f"{kind}; the server's log has the details under request {reference}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))


if __name__ == "__main__":
    from fluxvae.demo import main

    raise SystemExit(main())
