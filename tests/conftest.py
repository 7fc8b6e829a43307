import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bits depend on the number of threads: runs inside and outside of this process are compared.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import captured  # noqa: E402
from common.kernels import views  # noqa: E402
from samples import StandIn  # noqa: E402


@pytest.fixture(autouse=True)
def zeros_are_skipped_as_before():
    """What a test, or a script in its process, chose for skipping zeros ends with the test."""
    before = views.skip_zeros.set("auto")
    yield
    views.skip_zeros.reset(before)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are captured, on a CPU too."""
    monkeypatch.setitem(captured.GRAPHS, "cpu", StandIn)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


@pytest.fixture
def script(tmp_path):
    """Run one of the project's scripts in an empty folder; returns the finished process."""

    def run(name, *arguments, **options):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, **options)

    return run


@pytest.fixture
def refused(script):
    """Run a script that must refuse: exit code 2 and one line on stderr, which is returned."""

    def run(name, *arguments, **options):
        done = script(name, *arguments, **options)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        return lines[0]

    return run
