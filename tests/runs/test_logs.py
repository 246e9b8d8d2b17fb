"""What processes print is kept in bounds, whoever dies, and what ended a run is kept whole."""

import logging
import os
import subprocess
import sys

import pytest

from agentrl.runs.logs import bound, log_folder, logged, process_name

PROCESS = """
import os, signal, subprocess
from agentrl.runs.logs import capture_output

capture_output()
print("from Python")
subprocess.run(["echo", "from a child"])
os.write(2, b"from below Python\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""


def spawn(logs, name):
    environment = os.environ | log_folder(logs) | process_name(name)
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    return subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, env=environment)


def test_all_that_a_process_and_its_children_print_outlives_its_being_killed(tmp_path):
    for _ in range(2):
        assert spawn(tmp_path, "engine-0").stdout == ""
    said = (tmp_path / "engine-0.log").read_text().splitlines()
    assert said[0].startswith("--- ")
    # A process that is made anew goes on in the file of the one before.
    assert said[1:4] == said[5:] == ["from Python", "from a child", "from below Python"]


def test_where_the_folder_is_not_shared_a_process_prints_as_ever(tmp_path):
    assert "from Python" in spawn(tmp_path / "elsewhere", "engine-0").stdout
    assert list(tmp_path.iterdir()) == []


def test_a_log_keeps_its_newest_part_and_goes_on_where_it_is(tmp_path):
    path = tmp_path / "engine-0.log"
    with path.open("ab", buffering=0) as log:
        for number in range(100):
            log.write(b"%05d\n" % number)
            bound(path, limit=60)
            assert path.stat().st_size <= 60
    kept = (tmp_path / "engine-0.log.1").read_bytes() + path.read_bytes()
    assert len(kept) <= 120
    assert kept.split() == [b"%05d" % number for number in range(100 - len(kept) // 6, 100)]


def test_the_driver_logs_into_the_run_folder_and_stops_doing_so(tmp_path):
    log = logging.getLogger("agentrl.somewhere")
    before = list(logging.getLogger().handlers)
    with logged(tmp_path):
        log.info("inside")
    log.warning("outside")
    assert logging.getLogger().handlers == before
    text = (tmp_path / "logs" / "driver.log").read_text()
    assert "INFO agentrl.somewhere: inside" in text
    assert "outside" not in text


def test_a_failure_leaves_its_whole_traceback_and_a_note_of_where_it_is(tmp_path):
    with pytest.raises(ValueError, match="the effect") as caught, logged(tmp_path):
        raise ValueError("the effect") from KeyError("the cause")
    text = (tmp_path / "error.txt").read_text()
    assert text.index("KeyError: 'the cause'") < text.index("ValueError: the effect")
    assert caught.value.__notes__ == [f"traceback: {tmp_path}/error.txt; logs: {tmp_path}/logs"]
    with logged(tmp_path):
        assert not (tmp_path / "error.txt").exists()


def test_a_failure_that_cannot_be_written_is_not_hidden_behind_that(tmp_path):
    def fail():
        # A folder stands where the file is to be: as on a full disk, it cannot be written.
        (tmp_path / "error.txt").mkdir()
        raise ValueError("the failure")

    with pytest.raises(ValueError, match="the failure") as caught, logged(tmp_path):
        fail()
    assert "the traceback cannot be kept" in caught.value.__notes__[0]


@pytest.mark.parametrize("wish", [SystemExit(143), KeyboardInterrupt()])
def test_somebodys_wish_to_stop_is_no_failure(tmp_path, wish):
    with pytest.raises(type(wish)), logged(tmp_path):
        raise wish
    assert not (tmp_path / "error.txt").exists()
    assert f"ended by {type(wish).__name__}" in (tmp_path / "logs" / "driver.log").read_text()
