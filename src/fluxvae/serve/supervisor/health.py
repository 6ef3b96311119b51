"""Whether a server that does not answer is busy or gone: the rule, and the tiny decode that asks.

Triton says that it is ready while its Python process is dead, and a decode of a large image on a CPU takes minutes in
which nothing else is answered. So a tiny decode is asked for, one at a time, and the rule is:

- answered: healthy;
- refused with UNAVAILABLE (the queue is full), or not answered yet: busy, as long as the Python processes compute:
  at least `WORK_S` seconds of processor time within every `patience_s`;
- not answered and not computing for `patience_s`: hung;
- not answered for `busy_limit_s`, however busy: hung;
- any other answer, such as that the Python process is not healthy: one is forgiven, a second in a row is not.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

__all__ = ["ASK_EVERY_S", "Answer", "Outcome", "Probe", "Watch", "decode_tiny", "get"]

ASK_EVERY_S = 2.0
"""Between an answer and the next question."""
WORK_S = 0.3
"""Processor time that an idle Python process does not use in `patience_s`; one that decodes does, within a second."""
_DEAD_STUB = "not healthy"
_TINY = json.dumps(
    {
        "id": "supervisor",
        # It is small, and its own queue is never full; "probe" is for askers who do not know the model's features.
        "parameters": {"priority": 1, "probe": True},
        "inputs": [
            {"name": "latents", "datatype": "FP32", "shape": [1, 1, 1], "data": [0.0]},
            {"name": "height", "datatype": "INT32", "shape": [1, 1], "data": [16]},
            {"name": "width", "datatype": "INT32", "shape": [1, 1], "data": [16]},
        ],
        "outputs": [{"name": "images"}],
    }
)


class Answer(Enum):
    """What became of one question."""

    OK = "ok"
    BUSY = "busy"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """An answer, and its reason where it is not OK."""

    answer: Answer
    reason: str = ""
    final: bool = False
    """No second question is needed."""


def decode_tiny(address: str, model: str, timeout_s: float) -> Outcome:
    """Decode 16x16 pixels over Triton's HTTP endpoint.

    Args:
        address: ``host:port``.
        model: any of ours.
        timeout_s: for connecting and answering.
    """
    outcome, body = _request("POST", address, f"/v2/models/{model}/infer", _TINY, timeout_s)
    if outcome.answer is Answer.OK:
        try:
            [image] = json.loads(body)["outputs"]
            shape = image["shape"]
        except (ValueError, KeyError, TypeError):
            return Outcome(Answer.FAILED, f"a tiny decode was answered with {body[:200]!r}")
        if shape != [1, 16, 16, 3]:
            return Outcome(Answer.FAILED, f"a tiny decode was answered with shape {shape}, expected [1, 16, 16, 3]")
    return outcome


def get(address: str, path: str, timeout_s: float) -> Outcome:
    """GET a page that says by its status whether all is well."""
    return _request("GET", address, path, None, timeout_s)[0]


def _request(method: str, address: str, path: str, body: str | None, timeout_s: float) -> tuple[Outcome, bytes]:
    connection = http.client.HTTPConnection(address, timeout=timeout_s)  # a connection of its own, never by a proxy
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
    """One question at a time, asked in a thread, so that nobody waits and no questions pile up in a busy queue."""

    def __init__(self, ask: Callable[[], Outcome]) -> None:
        self._ask = ask
        self._thread: threading.Thread | None = None
        self._outcomes: list[Outcome] = []

    def start(self) -> None:
        """Ask, unless the last question is still open."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
            self._thread.start()

    def take(self) -> Outcome | None:
        """The answer, once."""
        if not self._outcomes:
            return None
        self._thread = None
        return self._outcomes.pop()

    @property
    def open(self) -> bool:
        """Whether a question waits for its answer."""
        return self._thread is not None

    def _run(self) -> None:
        self._outcomes.append(self._ask())


class Watch:
    """The rule of this module, over time. It knows no clock and no process: both are told to it.

    Args:
        patience_s: without an answer and without work.
        busy_limit_s: without an answer, whatever the work.
    """

    def __init__(self, *, now: float, patience_s: float, busy_limit_s: float) -> None:
        self._patience_s = patience_s
        self._busy_limit_s = busy_limit_s
        self._answered = now
        self._worked = now
        self._cpu_s: float | None = None
        self._failures = 0

    def judge(self, now: float, outcome: Outcome | None, cpu_s: float) -> str | None:
        """What is wrong, or None.

        Args:
            now: seconds.
            outcome: of a question that was answered since the last call.
            cpu_s: processor time of the working processes so far.
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
            return f"no decode was answered for {self._busy_limit_s:g} s, although it computes (--busy-limit)"
        if now - max(self._answered, self._worked) > self._patience_s:
            return f"hung: it neither answered nor computed for {self._patience_s:g} s"
        return None
