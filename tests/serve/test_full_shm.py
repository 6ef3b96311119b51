"""Shared memory that becomes full while a server runs: whoever finds no room is told so at once, and the others go on.

In a mount namespace of its own, where /dev/shm is a small tmpfs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxvae.serve.model import handover
from fluxvae.serve.model.handover import Room
from fluxvae.serve.supervisor.notices import Notices
from fluxvae.serve.triton_words import passing_trouble

CHILD = Path(__file__).parent / "full_shm_child.py"
AT_ONCE_S = 20.0  # enough for a decode on a busy machine; the fault that is tested for is that no answer ever comes


@pytest.fixture(scope="module")
def found(tritonserver: None, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    namespace = ["unshare", "-rm", "sh", "-c"]
    mount = "mount -t tmpfs -o size=160m tmpfs /dev/shm"
    try:
        subprocess.run([*namespace, mount], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine lets nobody mount a /dev/shm of his own: {error}")
    command = f"{mount} && exec {sys.executable} {CHILD} {tiny_checkpoint} {tmp_path_factory.mktemp('big')}"
    ended = subprocess.run([*namespace, command], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_who_finds_no_room_is_told_at_once(found: Any) -> None:
    served = found["served"]
    assert served["before"]["status"] == 200
    for case in ("large", "latents"):
        assert served[case]["status"] == 503, served[case]
        assert served[case]["kind"] == "UnavailableError"
        assert "shared memory" in served[case]["error"]
        assert served[case]["seconds"] < AT_ONCE_S


def test_the_others_go_on_and_it_recovers(found: Any) -> None:
    served = found["served"]
    assert served["small"] == {"status": 200, "bytes": 3 * 256 * 256 * 4, "seconds": served["small"]["seconds"]}
    assert served["after"] == {"status": 200, "bytes": 3 * 1024 * 1024 * 4, "seconds": served["after"]["seconds"]}
    assert not any("restarting" in line for line in served["told"])


def test_the_supervisor_says_so(found: Any) -> None:
    told = [line for line in found["served"]["told"] if "shared memory is full" in line]
    assert len(told) == 1, told
    assert told[0].startswith("Triton: shared memory is full: request ")
    assert "12.6 MB" in told[0]
    assert "--shm-size" in told[0]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_triton_tells_what_could_not_be_handed_over(found: Any, protocol: str) -> None:
    """If free memory is in pieces, only trying shows whether `execute`'s answer fits; if not, Triton sends an error."""
    (small, _), (large, seconds), (again, _), (after, _) = found["handed_over"][protocol]
    assert (small, again, after) == (1000, 1000, 4 * 2**20)
    assert passing_trouble(large) is not None, large
    assert seconds < AT_ONCE_S


@given(
    sizes=st.lists(st.integers(1, 2**26), min_size=1, max_size=4),
    region=st.integers(0, 2**27),
    disk=st.integers(0, 2**28),
)
def test_room(sizes: list[int], region: int, disk: int) -> None:
    room = handover.room_for(sizes, region, disk)
    if room is Room.NONE:
        assert sum(sizes) > region
        assert sum(sizes) > disk - len(sizes) * 2**20
    elif room is Room.AMPLE:
        assert sum(sizes) < disk - 2**26
    elif sum(sizes) > region:
        assert sum(sizes) < disk


def test_bytes_that_are_sent() -> None:
    files = np.array([[b"abc"], [b"defgh"]], dtype=np.object_)
    assert handover.sent_bytes([np.zeros((2, 3), np.float32), files]) == [24, 4 + 3 + 4 + 5]


def test_outside_of_triton_nothing_is_refused() -> None:
    assert handover.find_room([2**60]) is Room.TIGHT


def test_notices(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"{handover.LOG_MARK}: of an earlier run\n")
    notices = Notices(log)
    assert notices.take(0.0) is None
    with log.open("a") as file:
        file.write(f'E1127 "{handover.LOG_MARK}: request a: shared memory: no room"\nelse\n{handover.LOG_MARK}: half')
    assert notices.take(0.5) is None  # it is too soon to look again
    told = notices.take(1.0)
    assert told is not None
    assert told.startswith("shared memory is full: request a: no room.")
    with log.open("a") as file:
        file.write(" a line\n" + f"{handover.LOG_MARK}: request c\n")
    assert notices.take(2.0) is None  # people were told a moment ago
    with log.open("a") as file:
        file.write(f"{handover.LOG_MARK}: request d\n")
    told = notices.take(100.0)
    assert told is not None
    assert "request d (and 2 more like it)" in told
    log.write_text(f"{handover.LOG_MARK}: request e\n")  # the log was rotated
    told = notices.take(200.0)
    assert told is not None
    assert "request e" in told
    log.unlink()
    assert notices.take(300.0) is None
