"""What a run refuses before it starts, and what its folder says of a run that went on."""

# The fixtures of another module are arguments of these tests.
# ruff: noqa: F811

import pytest
from test_run import config, steps, trainer, write_questions  # noqa: F401, two are fixtures
from tiny import tiny_llama

from agentrl.models import ModelError
from agentrl.runs import RunError, RunFolder
from agentrl.training.plan import plan
from agentrl.training.run import train
from agentrl.types import AgentRLError

SECRET = "hunter2-swordfish"


def test_a_trainer_on_a_node_that_does_not_share_the_run_folder_is_refused(config, trainer):
    def forget(progress):
        # What the trainer's node would see: a folder of the same name that the driver did not write now.
        if progress.phase == "starting engines":
            (config().folder / "start.json").write_text('{"id": "of another start"}')

    with pytest.raises(RunError, match=r"node .* does not see the run folder .*/runs/run .*mount run_dir"):
        train(config(), resume=False, on_progress=forget)


@pytest.mark.parametrize("command", [lambda config: train(config, resume=False, on_progress=print), plan])
def test_an_adapter_of_another_model_is_refused_before_the_run_has_a_folder(config, tmp_path, command):
    from peft import LoraConfig, get_peft_model

    tiny_llama(64, hidden=16).save_pretrained(tmp_path / "model")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    get_peft_model(tiny_llama(64, hidden=32), lora).save_pretrained(tmp_path / "adapter")
    model = {"path": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter"), "lora": {"rank": 4, "alpha": 8}}
    with pytest.raises(ModelError, match=r"q_proj.* has the shape"):
        command(config(model=model))
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_questions_changed_does_not_go_on(config, trainer, tmp_path):
    trainer.before = lambda step: step < 3 or 1 / 0
    with pytest.raises(AgentRLError, match="ZeroDivisionError"):
        train(config(), resume=False, on_progress=lambda progress: None)
    write_questions(tmp_path, 3)
    with pytest.raises(
        RunError, match=r"questions\.jsonl \(data\.train\.0\) is not what the run began with: its sha256"
    ):
        train(config(), resume=True, on_progress=lambda progress: None)
    assert steps(config()) == [1, 2]
    write_questions(tmp_path, 6)
    trainer.before = lambda step: None
    train(config(), resume=True, on_progress=lambda progress: None)
    assert trainer.resumed == [None, "checkpoint-2"]


def test_a_finished_run_takes_more_steps_and_says_what_changed(config, trainer, tmp_path):
    train(config(), resume=False, on_progress=lambda progress: None)
    RunFolder(config().folder).adapter.rmdir()
    seen = []
    longer = config(training={"steps": 5})
    train(longer, resume=True, on_progress=seen.append)
    assert seen[0].phase == "continuing with training.steps: 3 -> 5"
    assert steps(longer) == [1, 2, 3, 4, 5]


def test_a_secret_is_in_no_file_of_a_run_and_in_nothing_that_is_printed(
    config, trainer, agentrl, tmp_path, monkeypatch
):
    monkeypatch.setenv("RETRIEVER_TOKEN", SECRET)
    trainer.before = lambda step: step < 3 or 1 / 0
    file = tmp_path / "config.yaml"
    file.write_text(config().to_yaml())
    printed = "".join(map(str, [*agentrl("train", "--config", file), *agentrl("train", "--config", file, "--dry-run")]))
    written = [path for path in config().folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "error.txt", "driver.log", "metrics.jsonl"} <= {path.name for path in written}
    assert SECRET not in printed
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
