"""Fixtures that several test files share."""

import gc
import json
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from real_data import NOT_CHECKED

from agentrl import cli
from agentrl.agent.codec import Codec
from agentrl.agent.protocols import SearchTags
from agentrl.runs import read_trajectories

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("agentrl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("agentrl")


@pytest.fixture(scope="module", autouse=True)
def _light_collections():
    """Leave the libraries' millions of objects out of garbage collection: each training run collects at its end."""
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 512 ids, trained on the protocol's own texts, with the control tokens of a chat model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    protocol = SearchTags()
    texts = [
        protocol.instruction(),
        protocol.worked_examples(2),
        protocol.correction("no <search> or <answer> was closed"),
        "\n<information>\nNothing was found.\n</information>\n",
        "Question: ",
    ]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


@pytest.fixture(scope="session")
def codec(tokenizer):
    return Codec(tokenizer)


@pytest.fixture
def agentrl(monkeypatch, capsys):
    """Run a command in this process; return exit status, standard output and standard error."""
    # main() takes over SIGTERM, which belongs to the test's own process here.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["agentrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        written = capsys.readouterr()
        return left.value.code, written.out, written.err

    return run


@pytest.fixture
def rollout_in_examples(agentrl, tmp_path, monkeypatch):
    """Sample four episodes of the pocket policy in the folder of the examples, with a module beside them and some settings.

    `of(module, settings)` writes the module `of_mine`, and returns the episodes with what was printed.
    """

    def of(module, *settings):
        (tmp_path / "of_mine.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path)
        # A user's own module is found where the command is run.
        monkeypatch.chdir(Path(__file__).parents[1] / "examples")
        question = {
            "id": "1",
            "question": "Which country does the city of Recife belong to?",
            "golden_answers": ["Brazil"],
        }
        (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
        config, out = tmp_path / "small.yaml", tmp_path / "episodes.jsonl.zst"
        config.write_text(
            "name: small\nmodel: {path: pocket_policy}\nretriever: {kind: object, target: 'of_mine:Atlas', k: 1}\n"
            "agent: {instruction: '', max_turns: 2, max_turn_tokens: 48, max_episode_tokens: 512}\nengine: {threads: 1}\n"
        )
        arguments = ["--quick", "--samples", 4, "--questions", tmp_path / "questions.jsonl", "--out", out]
        status, shown, err = agentrl("rollout", "--config", config, *settings, *arguments)
        assert (status, err) == (0, "")
        return list(read_trajectories(out)), shown

    yield of
    # The next test has another module of this name.
    sys.modules.pop("of_mine", None)


def pytest_terminal_summary(terminalreporter):
    """Name what a passing run has not checked, for want of real data."""
    reasons = [
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    ]
    unchecked = [reason.removeprefix(NOT_CHECKED) for reason in reasons if reason.startswith(NOT_CHECKED)]
    if unchecked:
        terminalreporter.section("not checked")
        terminalreporter.write_line(f"{len(unchecked)} tests against real data were skipped:")
        for reason in sorted(set(unchecked)):
            terminalreporter.write_line(f"  {reason}")
