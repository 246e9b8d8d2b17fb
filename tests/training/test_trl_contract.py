"""All that agentrl relies on in TRL and transformers without their promise, so that an upgrade of either fails here."""

import ast
import inspect
import random
import re
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import tiny_llama
from trainers import VOCABULARY, make_policy, make_trainer, make_trajectories
from trl import GRPOConfig, GRPOTrainer

import agentrl
from agentrl.training import trainer as module
from agentrl.training.sampling import ScoredBatch
from agentrl.training.scoring import Scorer
from agentrl.training.sharded import ShardedTrainer
from agentrl.training.trainer import StratifiedTrainer
from agentrl.training.updates import Additions

# The order in which one update of a batch calls them, with a checkpoint after it.
CALLS_OF_A_STEP = [
    "training_step",
    "_get_per_token_logps_and_entropies",
    "_get_grad_norm",
    "log",
    "_save_checkpoint",
    "_get_output_dir",
    "_save",
]
OVERRIDDEN = {*CALLS_OF_A_STEP, "_load_from_checkpoint", "create_optimizer", "get_decay_parameter_names"}
OVERRIDDEN_FOR_SHARES = {
    "_get_grad_norm",
    "_load_from_checkpoint",
    "_save_checkpoint",
    "create_optimizer",
    "train",
    "training_step",
}
READ = {
    "_compute_loss",
    "_metrics",
    "_tokenizer",
    "accelerator",
    "args",
    "beta",
    "epsilon_high",
    "epsilon_low",
    "importance_sampling_level",
    "loss_type",
    "max_completion_length",
    "model",
    "optimizer",
    "state",
}
WRITTEN = "current_gradient_accumulation_steps"
# What TRL's loss takes from a batch, after the log-probabilities.
KEYS = ["prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "num_items_in_batch"]
KEYS += ["advantages", "old_per_token_logps", "ref_per_token_logps"]


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    """A trainer of TRL's own, without agentrl."""
    return GRPOTrainer(
        model=tiny_llama(VOCABULARY, hidden=8, max_position_embeddings=64),
        processing_class=tokenizer,
        reward_funcs=lambda **_: [],
        train_dataset=Dataset.from_dict({"prompt": [""]}),
        args=GRPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to=[]),
    )


def own_and_foreign_names():
    """The names that StratifiedTrainer defines, and those that it uses of itself and does not define."""
    (tree,) = ast.parse(inspect.getsource(StratifiedTrainer)).body
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            on_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if on_super:
                used.add(node.attr)
            elif on_self and isinstance(node.ctx, ast.Store) and node.attr not in READ:
                own.add(node.attr)
            elif on_self:
                used.add(node.attr)
    return own, used - own - {"__init__"}


def test_the_lists_of_this_file_are_complete():
    own, foreign = own_and_foreign_names()
    assert foreign == READ
    # What is defined here and in TRL as well is overridden.
    assert {name for name in own if hasattr(GRPOTrainer, name)} - {"__init__"} == OVERRIDDEN


def test_what_training_with_shares_overrides_is_there():
    theirs = {name for name in vars(ShardedTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    assert theirs == OVERRIDDEN_FOR_SHARES


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_what_is_overridden_is_there_and_takes_the_same_arguments(name):
    theirs = inspect.signature(getattr(GRPOTrainer, name)).parameters
    ours = inspect.signature(getattr(StratifiedTrainer, name)).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values())
    assert [n for n in theirs if n not in ours] == [] or takes_more
    assert [n for n, p in ours.items() if n not in theirs and p.kind is not inspect.Parameter.VAR_KEYWORD] == []


def test_trls_loss_divides_by_what_is_written():
    assert WRITTEN in own_and_foreign_names()[0]
    assert f"self.{WRITTEN}" in inspect.getsource(GRPOTrainer._compute_loss)


def test_an_adapter_that_changes_nothing_yet_has_the_model_without_it_for_a_reference(tmp_path, tokenizer):
    fresh = make_policy()
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trainer = make_trainer(tmp_path, tokenizer, None, fresh, beta=0.1)
    assert list(trainer.model.peft_config) == ["default"]
    assert list(make_trainer(tmp_path, tokenizer, None, make_policy(), beta=0.1).model.peft_config) == [
        "default",
        "ref",
    ]


@pytest.mark.parametrize("additions", [Additions(kl_estimator="k2"), Additions(kl_estimator="k1", kl_in_reward=True)])
def test_trl_keeps_a_reference_for_a_kl_term_that_is_not_its_own(tmp_path, tokenizer, additions):
    """`beta` of its arguments makes TRL copy the adapter, and `beta` of the trainer is what its loss reads."""
    trainer = make_trainer(tmp_path, tokenizer, None, additions=additions, beta=0.1)
    assert "ref" in trainer.model.peft_config
    assert trainer.beta == 0.0
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "self.beta * per_token_kl" in source
    assert "args.beta" not in source


def test_the_adapter_of_a_quantised_model_keeps_its_precision(tmp_path, tokenizer):
    """TRL goes by this mark of transformers, and rounds to bf16."""
    policy = make_policy()
    policy.get_base_model().is_loaded_in_4bit = True
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    trainer = make_trainer(tmp_path, tokenizer, None, policy)
    after = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert "is_loaded_in_4bit" in inspect.getsource(GRPOTrainer.__init__)


@pytest.mark.parametrize("name", sorted(READ))
def test_what_is_read_is_there(plain, name):
    assert hasattr(plain, name)


def test_metrics_are_lists_by_name_for_training(plain):
    plain._metrics["train"]["any name"].append(1.0)
    assert plain._metrics["train"].pop("any name") == [1.0]


def test_no_other_file_reaches_into_the_trainer():
    reach = re.compile(r"trainer\._|GRPOTrainer\b")
    # What the integration relies on, its own test names.
    allowed = {Path(module.__file__), Path(agentrl.__file__).parent / "integrations" / "trl.py"}
    found = [
        str(path)
        for path in Path(agentrl.__file__).parent.rglob("*.py")
        if path not in allowed and reach.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_one_step_calls_each_override_in_this_order(tmp_path, tokenizer, monkeypatch):
    calls, read, adapters = [], [], []

    class Watched(dict):
        """A batch that notes the keys that are read."""

        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            if key in KEYS:
                read.append(key)
            return super().get(key, default)

    for name in set(CALLS_OF_A_STEP):
        method = getattr(StratifiedTrainer, name)

        def noted(self, *args, name=name, method=method, **kwargs):
            calls.append(name)
            if name == "_get_per_token_logps_and_entropies":
                read.append("(log-probabilities)")
            return method(self, *args, **kwargs)

        monkeypatch.setattr(StratifiedTrainer, name, noted)
    loss = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: loss(self, model, Watched(inputs)))
    score = Scorer.score
    monkeypatch.setattr(
        Scorer,
        "score",
        lambda self, *args, **named: adapters.append(trainer.model.active_adapter) or score(self, *args, **named),
    )
    policy = make_policy()
    batch = ScoredBatch(make_trajectories(2, random.Random(1)), [1.0, -1.0], {"ours": 3.0})
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, batch, policy, beta=0.1, prove_weights=False, **saving)
    trainer.train()

    assert list(dict.fromkeys(calls)) == CALLS_OF_A_STEP
    assert adapters == ["ref", "default"], "TRL's use_adapter switches to the reference and back"
    assert set(read) == {*KEYS, "(log-probabilities)"}
    assert read.index("advantages") > read.index("(log-probabilities)")
    logged = trainer.state.log_history[0]
    assert logged["ours"] == 3.0
    assert logged["seconds/train"] > 0


def test_a_checkpoint_is_loaded_through_the_override(tmp_path, tokenizer, monkeypatch):
    batch = ScoredBatch(make_trajectories(2, random.Random(1)), [1.0, -1.0], {})
    settings = {"beta": 0.1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, tokenizer, batch, make_policy(), **settings)
    trainer.train()
    loaded = []
    load = StratifiedTrainer._load_from_checkpoint
    monkeypatch.setattr(
        StratifiedTrainer,
        "_load_from_checkpoint",
        lambda self, *args: (loaded.append(args[0]), load(self, *args)),
    )
    again = make_trainer(tmp_path, tokenizer, batch, make_policy(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert loaded == [str(tmp_path / "checkpoint-1")]
    weights = dict(trainer.model.named_parameters())
    assert all(p.equal(weights[n]) for n, p in again.model.named_parameters())
