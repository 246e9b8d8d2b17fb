"""Samples through real engines, undisturbed and then with their processes killed meanwhile; writes what came of it as JSON.

Run as `python killed_engine.py FILE EPISODES KEY=VALUE...`; the overrides are those of pocket.yaml. It kills an engine's
core, then a rollout worker, whose core must not outlive it, and a core again.
"""

import dataclasses
import json
import sys
from pathlib import Path

import psutil

from agentrl.config import load_config
from agentrl.data.inputs import evaluation_questions
from agentrl.rollout.cluster import cluster

KILLS = ("core", "worker", "core")
# How long a core may take to end after its worker.
CORE_SECONDS = 30


def cores() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if is_core(process)]


def is_core(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in " ".join(process.cmdline())
    # One that was killed before stays in the list until its parent has noticed.
    except psutil.Error:
        return False


def main() -> None:
    episodes = int(sys.argv[2])
    config = load_config("pocket.yaml", sys.argv[3:])
    requests = [(q, [f"{q.id}/{i}" for i in range(episodes)]) for q in evaluation_questions(config.data)]
    killed, outlived = [], []

    def kill(done: int) -> None:
        # Spread over the run, the last one before its end.
        due = len(killed) < len(KILLS) and done > (len(killed) + 0.5) * episodes * len(requests) / (len(KILLS) + 1)
        core = next(iter(cores()), None) if due else None
        if core is None:
            return
        what = KILLS[len(killed)]
        if what == "core":
            core.kill()
        else:
            core.parent().kill()
            outlived.extend(process.pid for process in psutil.wait_procs([core], CORE_SECONDS)[1])
        killed.append(what)

    with cluster(config) as running:
        # A group may be with each process that is killed.
        supervisor = running.pool._supervisor
        supervisor.limits = dataclasses.replace(supervisor.limits, tries=len(KILLS) + 1)
        calm = running.pool.sample(requests, 1.0)
        disturbed = running.pool.sample(requests, 1.0, kill)
        # The rest may be done before the last one that was killed is back; this waits until every worker is there.
        running.pool.wake()
        counters = running.pool.counters
    result = {
        "killed": killed,
        "outlived": outlived,
        "counters": counters,
        "asked": [names for _, names in requests],
        "got": [[t.id for t in group] for group in disturbed],
        "failed": sum(not t.valid for group in disturbed for t in group),
        "turns": [
            [[[list(turn.token_ids) for turn in t.turns] for t in group] for group in groups]
            for groups in (calm, disturbed)
        ],
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
