"""After a fork, a decode raises an error where PyTorch would hang, and gives the same image where it would not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hangs with GNU's OpenMP, which PyTorch uses on Linux")


def test_a_forked_process_decodes_or_says_why_not() -> None:
    script = Path(__file__).with_name("fork_child.py")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == 16
    refused = {case for case in found if case.startswith("parallel") and case.split()[2] in ("same", "loads")}
    assert len(refused) == 5
    for case, came_to in found.items():
        if case in refused:
            assert came_to.startswith("ForkedProcessError: fork: this process was forked from one in which"), case
            assert "'spawn'" in came_to
            assert "torch.set_num_threads(1)" in came_to
        else:
            assert came_to == "equal", case
