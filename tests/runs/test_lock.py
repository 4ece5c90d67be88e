"""The lock of a run directory, between real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.errors import RunDirectoryError
from edgetune.runs import lock

_HOLD = (
    "import sys; from pathlib import Path; from edgetune.runs import lock\n"
    "with lock.writing(Path(sys.argv[1]), 'a training'):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


def test_one_writer_at_a_time_and_a_kill_lets_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    held = rf"^a training \(pid {holder.pid}\) is writing in "
    with pytest.raises(RunDirectoryError, match=held):
        lock.refuse_if_written(run)
    with pytest.raises(RunDirectoryError, match=held), lock.writing(run, "other"):
        pass
    holder.kill()
    holder.communicate()
    assert (run / lock.FILE).is_file()  # what the kill left says nothing
    lock.refuse_if_written(run)
    with lock.writing(run, "other"):
        lock.refuse_if_written(run)  # one does not stand in one's own way
        with pytest.raises(RunDirectoryError, match="is writing in"), lock.writing(run, "third"):
            pass
    assert list(run.iterdir()) == []
