"""Sends many requests that Hypothesis makes, and counts their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

Case = TypeVar("Case")


def assert_fuzzed(check: Callable[[Case], int], requests: SearchStrategy[Case], examples: int) -> None:
    """Check so many requests, by ``check``, which returns an answer's status.

    A fair part of them must be good requests, and another bad ones, or they would show little.
    """
    statuses: list[int] = []

    @given(request=requests)
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    def fuzz(request: Case) -> None:
        statuses.append(check(request))

    fuzz()
    counts = Counter(statuses)
    assert len(statuses) >= examples
    assert counts[200] > 500, counts
    assert counts[400] > 500, counts
