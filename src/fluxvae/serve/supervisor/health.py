"""Decides whether a server that does not answer is busy or hung, by asking it for a tiny decode or encode.

Triton's own readiness cannot decide this: Triton says that it is ready even while the Python process of a model is
dead. And a missing answer alone does not mean that the server hangs: decoding a large image on a CPU takes minutes, in
which nothing else is answered. So a tiny decode is asked for, one at a time (a model that decoded a moment ago may
answer with an earlier image, see `fluxvae.serve.model.proof`), and this is the rule:

- A decode that is answered means that the server is healthy.
- A decode that is refused with UNAVAILABLE (the queue is full), or not answered yet, means that it is busy, as long as
  its Python processes compute: at least `WORK_S` seconds of processor time within every `patience_s`.
- A server that has neither answered nor computed for `patience_s` is hung.
- A server that has not answered for `busy_limit_s` is hung, however busy it is.
- Any other answer is a failure. One is forgiven, but not a second in a row, and not Triton's word that the Python
  process is not healthy.
"""

from __future__ import annotations

import http.client
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fluxvae.serve.models import encodes

__all__ = ["ASK_EVERY_S", "Answer", "Outcome", "Probe", "Watch", "ask_tiny", "get"]

ASK_EVERY_S = 2.0
"""Seconds between an answer and the next question."""
WORK_S = 0.3
"""Seconds of processor time that show work: an idle Python process does not use them in `patience_s`, and one that
decodes uses them within a second."""
_DEAD_STUB = "not healthy"
_SIZE = 16
"""The height and width, in pixels, of the image that is asked for: those of one packed token."""


class Answer(Enum):
    """What a question to the server led to: a good answer, a refusal because it is busy, or a failure."""

    OK = "ok"
    BUSY = "busy"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """The answer to one question, with the reason where it is not OK."""

    answer: Answer
    reason: str = ""
    final: bool = False
    """Whether this failure settles the matter, so that no second question is needed."""


def ask_tiny(address: str, model: str, timeout_s: float) -> Outcome:
    """Ask a model of a running Triton to decode or encode 16x16 pixels, over Triton's HTTP endpoint.

    Args:
        address: the ``host:port`` of that endpoint.
        model: the name of any of our models.
        timeout_s: how long connecting, and then answering, may take.
    """
    body = json.dumps(_tiny_encode() if encodes(model) else _tiny_decode())
    outcome, answer = _request("POST", address, f"/v2/models/{model}/infer", body, timeout_s)
    if outcome.answer is Answer.OK:
        try:
            [output] = json.loads(answer)["outputs"]
            shape = output["shape"]
        except (ValueError, KeyError, TypeError):
            return Outcome(Answer.FAILED, f"a tiny request was answered with {answer[:200]!r}")
        # A decode's pixels, or an encode's one token, whose number of features is the checkpoint's.
        pixels = [[1, _SIZE, _SIZE, channels] for channels in (3, 4)]
        expected = [[1, 1, *shape[2:3]]] if encodes(model) else pixels
        if shape not in expected:
            either = " or ".join(map(str, expected))
            return Outcome(Answer.FAILED, f"a tiny request was answered with shape {shape}, expected {either}")
    return outcome


def _tiny_decode() -> dict[str, Any]:
    return _tiny(
        "images",
        {"name": "latents", "datatype": "FP32", "shape": [1, 1, 1], "data": [0.0]},
        {"name": "height", "datatype": "INT32", "shape": [1, 1], "data": [_SIZE]},
        {"name": "width", "datatype": "INT32", "shape": [1, 1], "data": [_SIZE]},
    )


def _tiny_encode() -> dict[str, Any]:
    shape = [1, _SIZE, _SIZE, 3]
    return _tiny("latents", {"name": "images", "datatype": "UINT8", "shape": shape, "data": [0] * math.prod(shape)})


def _tiny(output: str, *inputs: dict[str, Any]) -> dict[str, Any]:
    """A request for an output. It is tiny, so it may go before all others, and the queue of priority 1 is never full.

    The parameter ``probe`` makes a model that decodes take zeros of its own format instead of these latents, because
    the supervisor does not know how many features the latents of a model have.
    """
    parameters = {"priority": 1, "probe": True}
    return {"id": "supervisor", "parameters": parameters, "inputs": list(inputs), "outputs": [{"name": output}]}


def get(address: str, path: str, timeout_s: float) -> Outcome:
    """GET a page whose HTTP status says whether all is well: 200 is OK, 503 busy, and anything else a failure."""
    return _request("GET", address, path, None, timeout_s)[0]


def _request(method: str, address: str, path: str, body: str | None, timeout_s: float) -> tuple[Outcome, bytes]:
    connection = http.client.HTTPConnection(address, timeout=timeout_s)  # unlike urllib, this never uses a proxy
    try:
        connection.request(method, path, body, {"Connection": "close"})
        response = connection.getresponse()
        answer = response.read()
    except TimeoutError:
        return Outcome(Answer.FAILED, f"no answer within {timeout_s:g} s"), b""
    except (OSError, http.client.HTTPException) as error:
        return Outcome(Answer.FAILED, f"no answer: {error or type(error).__name__}"), b""
    finally:
        connection.close()
    if response.status == 200:
        return Outcome(Answer.OK), answer
    text = answer.decode(errors="replace").strip()[:500]
    kind = Answer.BUSY if response.status == 503 else Answer.FAILED
    return Outcome(kind, f"HTTP {response.status}: {text}", final=_DEAD_STUB in text), answer


class Probe:
    """Asks one question at a time, in a thread.

    So the caller never waits for an answer, and no questions pile up in the queue of a busy server.

    Args:
        ask: asks the question and returns what it led to; it may take as long as it likes.
    """

    def __init__(self, ask: Callable[[], Outcome]) -> None:
        self._ask = ask
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []

    def start(self) -> None:
        """Ask, unless the answer to the last question has not been taken yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
            self._thread.start()

    def take(self) -> Outcome | None:
        """Return the answer to the last question, once. None while there is none, or after it was taken."""
        if not self._outcomes:
            return None
        self._thread = None
        return self._outcomes.pop()

    @property
    def open(self) -> bool:
        """Whether a question was asked whose answer has not been taken."""
        return self._thread is not None

    def _run(self) -> None:
        self._outcomes.append(self._ask())


class Watch:
    """Applies the rule of this module to one server over time.

    It reads no clock and looks at no process: the caller passes the time and the processor time, so tests need neither.

    Args:
        now: the time at which the watch begins, in seconds; until then the server counts as having answered.
        patience_s: after how many seconds without an answer and without work the server counts as hung.
        busy_limit_s: after how many seconds without an answer it counts as hung, however much it works.
    """

    def __init__(self, *, now: float, patience_s: float, busy_limit_s: float) -> None:
        self._patience_s = patience_s
        self._busy_limit_s = busy_limit_s
        self._answered = now
        self._worked = now
        self._cpu_s: float | None = None
        self._failures = 0

    def judge(self, now: float, outcome: Outcome | None, cpu_s: float) -> str | None:
        """Return in words what is wrong with the server, or None where nothing is.

        Args:
            now: the time, in seconds, by the same clock as at the start.
            outcome: what a question led to that was answered since the last call; None where none was answered.
            cpu_s: the processor time, in seconds, that the server's Python processes have used so far.
        """
        if self._cpu_s is None or cpu_s - self._cpu_s >= WORK_S:
            self._cpu_s, self._worked = cpu_s, now
        if outcome is not None:
            if outcome.answer is Answer.FAILED:
                self._failures += 1
                if outcome.final or self._failures > 1:
                    return outcome.reason
            else:
                self._failures = 0
            if outcome.answer is Answer.OK:
                self._answered = now
                return None
        if now - self._answered > self._busy_limit_s:
            return f"no request was answered for {self._busy_limit_s:g} s, although it computes (--busy-limit)"
        if now - max(self._answered, self._worked) > self._patience_s:
            return f"hung: it neither answered nor computed for {self._patience_s:g} s"
        return None
