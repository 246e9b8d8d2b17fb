"""A run with Ray, an engine and a trainer in processes of their own: what they say, and what ended it, is in its folder."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from tiny import tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECRET = "hunter2-swordfish"

ESTIMATOR = """
import os
import sys

def broken(batch):
    if "RANK" not in os.environ:
        # Outside the trainer's process, where it is tried before the run begins.
        return batch.rewards
    print("printed by the user's estimator", file=sys.stderr)
    raise ZeroDivisionError("of the user's own\\nand a second line")
"""


class Search(BaseHTTPRequestHandler):
    """Answers as Search-R1's server does, to whoever has the token."""

    def do_POST(self):
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        known = self.headers["Authorization"] == f"Bearer {SECRET}"
        hit = {"document": {"id": "1", "contents": '"Tay"\nA river.'}, "score": 1.0}
        body = json.dumps({"result": [[hit]] * len(queries)} if known else {"detail": "no token"}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Search)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    server.shutdown()


@pytest.fixture
def project(tmp_path, tokenizer, url):
    """A folder with a tiny model, questions, an estimator that fails, and the config that names them."""
    model = tiny_llama(len(tokenizer), hidden=32, max_position_embeddings=512, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"id": str(i), "question": f"why {i}?", "golden_answers": ["so"]} for i in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "estimator_of_mine.py").write_text(ESTIMATOR)
    config = {
        "name": "run",
        "model": {"path": "./model", "lora": {"rank": 4, "alpha": 8}},
        "data": {"root": ".", "train": [{"path": "questions.jsonl", "name": "q"}]},
        "engine": {"kind": "transformers", "threads": 1},
        "retriever": {"kind": "http", "url": url, "token_env": "RETRIEVER_TOKEN", "k": 1, "retries": 0},
        "agent": {"max_turns": 1, "max_turn_tokens": 8, "max_observation_tokens": 32, "max_episode_tokens": 256},
        "rollout": {"group_size": 2, "questions_per_step": 1, "max_failed_share": 0.9},
        "advantages": {"estimator": "estimator_of_mine:broken"},
        "training": {"steps": 1, "threads": 1},
        "evaluation": {"before": False, "after": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_failed_run_keeps_the_words_and_traceback_of_each_process_and_no_secret(project):
    environment = os.environ | {"RETRIEVER_TOKEN": SECRET}
    command = [sys.executable, "-m", "agentrl.cli", "train", "--config", "config.yaml"]
    ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=500)
    folder = project / "runs" / "run"
    assert ended.returncode == 1
    *_, message = ended.stderr.strip().splitlines()
    assert "ZeroDivisionError: of the user's own" in message
    assert message.endswith(f"traceback: {folder / 'error.txt'}; logs: {folder / 'logs'}")
    # The line of the user's code that failed, in another process.
    assert 'raise ZeroDivisionError("of the user' in (folder / "error.txt").read_text()
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert {"driver.log", "trainer.log", "engine-0.log"} <= logs.keys()
    assert "printed by the user's estimator" in logs["trainer.log"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in ended.stdout + ended.stderr
