"""Several trainer processes train what one trains, whatever share of the episodes each has."""

import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trainers import make_model, make_trainer, make_trajectories

from agentrl.training import ranks as ranks_module
from agentrl.training.optimizers import make_muon
from agentrl.training.ranks import FirstRankFailed, Ranks, share_out
from agentrl.training.sampling import ScoredBatch
from agentrl.training.sharded import ShardedTrainer
from agentrl.training.trainer import StratifiedTrainer
from agentrl.training.updates import Additions, Updates
from agentrl.types import End, FailureCause, Trajectory

STEPS = 5


@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(1, 4), st.integers(1, 5))
def test_shares_hold_whole_groups_and_each_of_them_once(sizes, group_size, ranks):
    tokens = [size for size in sizes for _ in range(group_size)]
    shares = share_out(tokens, group_size, ranks)
    assert len(shares) == ranks
    assert sorted(row for share in shares for row in share) == list(range(len(tokens)))
    for share in shares:
        for row in share:
            first = row - row % group_size
            assert set(range(first, first + group_size)) <= set(share)
    # A rank has at most the largest group more than any other.
    loads = [sum(tokens[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max([*sizes, 0]) * group_size


def batches():
    """Unequal groups; a step in which one group alone runs, so that a rank has nothing; one with a failed episode."""
    rng = random.Random(40)
    made = []
    for step in range(STEPS):
        episodes = make_trajectories(6, rng)
        advantages = [rng.gauss(0, 1) for _ in episodes]
        if step == 1:
            advantages[2:] = [0.0] * 4
        if step == 2:
            episodes[3] = Trajectory(
                "x", episodes[3].question, (1, 2), (), End.ENVIRONMENT_FAILURE, cause=FailureCause.RETRIEVER
            )
            advantages[3] = 0.0
        if step == 3:
            advantages = [0.0] * 6
        made.append(ScoredBatch(episodes, advantages, {}))
    return made


SETTINGS = [
    {},
    {"updates": Updates(group_size=2, epochs=2, minibatches=2), "loss": "grpo"},
    {"additions": Additions(importance=("truncate", 2.0), entropy_bonus=0.01), "beta": 0.1, "loss": "bnpo"},
    {"whole": True},
    {"whole": True, "additions": Additions(entropy_bonus=0.01), "beta": 0.1, "loss": "bnpo"},
    {"whole": True, "shard": True},
    {"whole": True, "shard": True, "packing": "none", "updates": Updates(group_size=2, epochs=2, minibatches=2)},
    {"whole": True, "shard": True, "additions": Additions(entropy_bonus=0.01), "beta": 0.1, "loss": "bnpo"},
]
NAMES = ["dapo", "minibatches", "all terms", "whole", "whole, all terms"]
NAMES += ["shares", "shares, minibatches, each episode alone", "shares, all terms"]


def train(folder, tokenizer, ranks, settings):
    """Train for five steps, and return the weights and the metrics."""
    chosen = {"updates": Updates(group_size=2)} | settings
    if chosen.pop("whole", False):
        chosen |= {"policy": make_model(), "reference": make_model(), "prove_weights": False}
    if chosen.pop("shard", False) and ranks.size > 1:
        chosen["kind"] = ShardedTrainer
    waiting = batches()
    each = chosen["updates"].per_batch
    trainer = make_trainer(
        folder,
        tokenizer,
        None,
        chosen.pop("policy", None),
        ranks=ranks,
        learning_rate=1e-3,
        max_steps=STEPS * each,
        logging_steps=each,
        save_strategy="no",
        lr_scheduler_type="constant",
        **chosen,
    )
    trainer._sample = lambda: waiting.pop(0)
    trainer.train()
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    whole = dict(trainer.model.named_parameters()) if trainer.weights is None else trainer.weights
    # Of shares the first process alone has the whole.
    weights = torch.cat([whole[name].detach().flatten() for name in trained if whole] or [torch.empty(0)])
    return weights, [line for line in trainer.state.log_history if "entropy" in line]


def in_ranks(rank, size, folder, tokenizer, work, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(work(folder, tokenizer, Ranks.of_this_process(), *arguments), folder / f"rank-{rank}")
    dist.destroy_process_group()


def spawn(folder, tokenizer, work, *arguments, size=2):
    """Run `work` in processes of their own and return what it returns on each rank."""
    torch.multiprocessing.spawn(in_ranks, (size, folder, tokenizer, work, *arguments), nprocs=size)
    return [torch.load(folder / f"rank-{rank}", weights_only=False) for rank in range(size)]


def sums(folder, tokenizer, ranks):
    # So that several buckets are needed, one of them with a tensor that is larger than a bucket.
    ranks_module._BUCKET = 10
    tensors = [torch.full(shape, float(ranks.rank + 1)) for shape in [(2, 3), (4,), (1,), (5, 5), (0,), (3,)]]
    ranks.add_up(tensors)
    return [(tuple(tensor.shape), set(tensor.flatten().tolist())) for tensor in tensors]


@pytest.mark.slow
def test_tensors_of_any_size_are_added_up_whole(tmp_path, tokenizer):
    for found in spawn(tmp_path, tokenizer, sums):
        assert found == [((2, 3), {3.0}), ((4,), {3.0}), ((1,), {3.0}), ((5, 5), {3.0}), ((0,), set()), ((3,), {3.0})]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_two_processes_train_the_weights_that_one_trains(tmp_path, tokenizer, settings):
    expected, wanted = train(tmp_path, tokenizer, Ranks(), settings)
    (first, logged), (second, _) = spawn(tmp_path, tokenizer, train, settings)
    assert torch.equal(first, second) or (settings.get("shard") and not len(second))
    assert (first - expected).abs().max() < 1e-6
    assert len(logged) == len(wanted) >= STEPS - 1
    for one, other in zip(logged, wanted, strict=True):
        for name in set(other) - {"seconds/train"}:
            assert one[name] == pytest.approx(other[name], abs=1e-4, rel=1e-3), name


def train_in_parts(folder, tokenizer, ranks, stops, optimizer=None):
    """Train for five steps; after each of `stops` another trainer goes on from the checkpoint, as another process would."""
    waiting, start = batches(), None
    for stop in (*stops, STEPS):
        trainer = make_trainer(
            folder,
            tokenizer,
            None,
            make_model(),
            prove_weights=False,
            updates=Updates(group_size=2),
            ranks=ranks,
            kind=ShardedTrainer if ranks.size > 1 else StratifiedTrainer,
            optimizer=optimizer,
            learning_rate=1e-3,
            max_steps=stop,
            save_steps=stop,
            lr_scheduler_type="constant",
        )
        trainer._sample = lambda: waiting.pop(0)
        trainer.train(resume_from_checkpoint=start)
        start = str(folder / f"checkpoint-{stop}")


@pytest.mark.slow
def test_a_checkpoint_of_shares_is_that_of_one_process_and_goes_on_as_if_nothing_had_happened(tmp_path, tokenizer):
    one, shares = tmp_path / "one", tmp_path / "shares"
    one.mkdir()
    shares.mkdir()
    train_in_parts(one, tokenizer, Ranks(), ())
    torch.multiprocessing.spawn(in_ranks, (2, shares, tokenizer, train_in_parts, (2,)), nprocs=2)
    wanted, found = (load_file(folder / f"checkpoint-{STEPS}/model.safetensors") for folder in (one, shares))
    assert found.keys() == wanted.keys()
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-6
    states = [torch.load(folder / f"checkpoint-{STEPS}/optimizer.pt")["state"] for folder in (one, shares)]
    assert states[0].keys() == states[1].keys()
    for number, moments in states[0].items():
        for name, value in moments.items():
            torch.testing.assert_close(states[1][number][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_shares_under_muon_go_on_from_a_checkpoint_to_the_bit(tmp_path, tokenizer):
    # Its matrix products are in bfloat16, so that shares are not compared with one process here.
    muon, found = partial(make_muon, rate=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1), []
    for name, stops in (("whole", ()), ("cut", (2,))):
        (tmp_path / name).mkdir()
        arguments = (2, tmp_path / name, tokenizer, train_in_parts, stops, muon)
        torch.multiprocessing.spawn(in_ranks, arguments, nprocs=2)
        found.append(load_file(tmp_path / name / f"checkpoint-{STEPS}" / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    begun = make_model().state_dict()
    assert any(not torch.equal(found[1][name], begun[name]) for name in found[1])


def failing(folder, tokenizer, ranks):
    def no_batch():
        raise ValueError("no batch today")

    try:
        ranks.from_first(no_batch)
    except (ValueError, FirstRankFailed) as error:
        return type(error).__name__


@pytest.mark.slow
def test_when_the_first_process_has_no_batch_the_others_end_too(tmp_path, tokenizer):
    assert spawn(tmp_path, tokenizer, failing) == ["ValueError", "FirstRankFailed"]
