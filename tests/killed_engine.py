"""Samples through real engines and kills their processes meanwhile; writes what came of it as JSON.

Run as `python killed_engine.py FILE EPISODES KILLS KEY=VALUE...`; the overrides are those of quickstart.yaml.
"""

import json
import sys
from pathlib import Path

import psutil

from agentrl.config import load_config
from agentrl.data.inputs import evaluation_questions
from agentrl.rollout.cluster import cluster


def is_engine(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in " ".join(process.cmdline())
    # One that was killed before stays in the list until its parent has noticed.
    except psutil.Error:
        return False


def main() -> None:
    episodes, kills = int(sys.argv[2]), int(sys.argv[3])
    config = load_config("quickstart.yaml", sys.argv[4:])
    questions = evaluation_questions(config.data)
    names = [[f"{q.id}/{i}" for i in range(episodes)] for q in questions]
    killed = []

    def kill(done: int) -> None:
        # Spread over the run, the last one before its end.
        if len(killed) < kills and done > (len(killed) + 0.5) * episodes * len(questions) / (kills + 1):
            core = next(filter(is_engine, psutil.Process().children(recursive=True)), None)
            if core is not None:
                core.kill()
                killed.append(core.pid)

    with cluster(config) as running:
        groups = running.pool.sample(list(zip(questions, names, strict=True)), 1.0, kill)
        counters = running.pool.counters
    result = {
        "killed": len(killed),
        "counters": counters,
        "asked": names,
        "got": [[t.id for t in group] for group in groups],
        "failed": sum(not t.valid for group in groups for t in group),
        "turns": [[[list(turn.token_ids) for turn in t.turns] for t in group] for group in groups],
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
