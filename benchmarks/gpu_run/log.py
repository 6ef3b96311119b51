"""The file of a run: one line of JSON for every event, written at once, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Event", "Log", "shown"]

Event = dict[str, Any]
"""``event`` is one of ``begin``, ``row``, ``skipped``, ``wrong``, ``failed`` and ``end``, ``part`` the part's name."""


class Log:
    """Appends events to a file that several processes have, and reads those that came since the last time."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0

    def write(self, event: str, part: str, **fields: Any) -> Event:
        """Append one event, print it, and return it."""
        written = {"event": event, "part": part, **fields}
        line = json.dumps(written, default=str) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        print(shown(written), flush=True)
        return written

    def new(self) -> list[Event]:
        """The events since the last call. A line that is not whole yet is left for the next call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")
        self._read += len(whole[0]) + len(whole[1])
        return [json.loads(line) for line in whole[0].splitlines()]


def shown(event: Event) -> str:
    """An event as a line for people."""
    fields = {name: value for name, value in event.items() if name not in ("event", "part", "text")}
    if event["event"] == "begin":
        return f"== {event['part']} ({fields['left']:.0f} s left)"
    values = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields.items()
    )
    mark = {"row": "  ", "end": "--"}.get(event["event"], "!!")
    return f"{mark} {event['part']}: {'' if event['event'] == 'row' else event['event'] + ' '}{'  '.join(values)}"
