"""What a process leaves on the disk is removed, by itself or by the next one."""

import signal
import subprocess
import sys
import tempfile

import pytest

from agentrl.engines.scratch import ScratchFolder

HOLD = """
import sys
from agentrl.engines.scratch import ScratchFolder
folder = ScratchFolder()
(folder.path / "adapter").write_bytes(b"weights")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def holder():
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def folders(temporary):
    return sorted(str(folder) for folder in temporary.glob("agentrl-*/*"))


def test_a_folder_goes_with_its_owner(temporary):
    folder = ScratchFolder()
    (folder.path / "file").touch()
    assert folders(temporary) == [str(folder.path)]
    folder.close()
    folder.close()
    assert folders(temporary) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_stays(temporary, holder):
    process, held = holder
    own = ScratchFolder()
    assert folders(temporary) == sorted([held, str(own.path)])
    process.send_signal(signal.SIGKILL)
    process.wait()
    other = ScratchFolder()
    assert folders(temporary) == sorted([str(own.path), str(other.path)])
