"""A process in which vLLM imports `agentrl.engines.vllm_worker` ends with the one that started it."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

# As vLLM does it: an engine starts a core, which imports the module after a while.
SCRIPT = """
import multiprocessing, os, sys, time

def core(import_late):
    if not import_late:
        import agentrl.engines.vllm_worker
    print(os.getpid(), flush=True)
    if import_late:
        multiprocessing.parent_process().join()
        import agentrl.engines.vllm_worker
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=core, args=(sys.argv[2] == "late",))
    process.start()
    process.join()
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.parametrize("imported", ["early", "late"])
def test_a_core_ends_with_the_engine_that_started_it_even_if_that_was_gone_before(tmp_path, method, imported):
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    engine = subprocess.Popen([sys.executable, str(script), method, imported], stdout=subprocess.PIPE, text=True)
    core = psutil.Process(int(engine.stdout.readline()))
    try:
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        deadline = time.monotonic() + 60
        while core.is_running() and core.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE
    finally:
        if core.is_running():
            core.kill()
        engine.stdout.close()
