"""A study that is ended ends its run in good order."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import learning
import pytest

CONFIG = """
name: small
model: {path: model}
data: {train: [{path: questions.jsonl, name: q}]}
retriever: {kind: http, url: "http://127.0.0.1:9/retrieve"}
training: {steps: 6}
"""

# Takes a step, then notes the signals that reach it, and takes a while to save its state at the first SIGTERM.
PATIENT = """
import os, signal, sys, time
from pathlib import Path
from agentrl.config import load_config
from agentrl.runs import RunFolder

received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
config = load_config(sys.argv[2], sys.argv[3:])
folder = RunFolder.create(config)
folder.append_metrics(1, {"reward/mean": 0.5, "searches/mean": 1.0, "episodes": 16.0})
Path("ready").touch()
# It does not outlive the tests, whatever its study does.
until = time.monotonic() + 60
while signal.SIGTERM not in received:
    if time.monotonic() > until:
        sys.exit(4)
    time.sleep(0.05)
Path("ending").touch()
for _ in range(20):
    time.sleep(0.05)
    if received.count(signal.SIGTERM) > 1:
        sys.exit(3)
Path("saved").write_text(" ".join(signal.Signals(number).name for number in received))
"""

STUDY = """
import signal, sys
import learning, learning_cells
# Whatever the tests themselves were started to ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
learning_cells.TRAIN = [sys.executable, "-P", "patient.py"]
learning.main()
"""


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


@pytest.fixture
def patient(tmp_path):
    """A study in a process group of its own, as a shell makes one, whose run waits for a signal."""
    (tmp_path / "small.yaml").write_text(CONFIG)
    (tmp_path / "model").mkdir()
    (tmp_path / "patient.py").write_text(PATIENT)
    (tmp_path / "study.py").write_text(STUDY)
    command = [sys.executable, "study.py", "sweep", "--variant", "a", "--config", "small.yaml", "--seeds", "1"]
    paths = os.pathsep.join([str(Path(learning.__file__).parent), *sys.path])
    with subprocess.Popen(
        [*command, "--out", "out", "--json", "results.json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_for(tmp_path / "ready", process)
            yield process
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_study_that_is_ended_asks_its_run_once_and_waits_until_it_has_saved_its_state(tmp_path, patient, number):
    # A terminal sends its signals to the whole group.
    os.killpg(patient.pid, number)
    patient.wait()
    assert (tmp_path / "saved").read_text() == "SIGTERM"
    noted = [json.loads(line)["event"] for line in (tmp_path / "out/a/seed-0.times.jsonl").read_text().splitlines()]
    assert noted[-1] == "end"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_without_its_state(tmp_path, patient):
    os.killpg(patient.pid, signal.SIGINT)
    wait_for(tmp_path / "ending", patient)
    os.killpg(patient.pid, signal.SIGINT)
    patient.wait()
    assert not (tmp_path / "saved").exists()
