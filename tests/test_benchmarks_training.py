"""The benchmark of an optimizer step compares equal work, refuses to compare anything else, and counts what is useful."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import training
from training import GradientsDiffer, difference, ratios, summary
from training_work import SIDES, Measured, Setting, counts, gradients, make_policy, product_rate, useful_flops
from training_workloads import MADE_BY, RECORDED, instructed, record, recorded, synthetic

# The models here are tiny: with more threads they wait for one another's barriers.
torch.set_num_threads(1)

TINY = Setting("random:tiny", "cpu", threads=1, tokens=300)


def silent(text):
    """Say nothing."""


def gradients_of(side, workload, folder, setting=TINY):
    policy = make_policy(setting)
    step = SIDES[side](policy, len(workload.trajectories), workload.group_size, setting, folder, silent)
    # A second step on a trainer must not remember the first.
    step(workload.shortened(5))
    policy.zero_grad()
    step(workload)
    return gradients(policy)


@pytest.fixture(scope="module")
def small():
    """Episodes of several turns, with shared beginnings, that a tiny model takes in a moment."""
    return recorded().first(4).within(512)


@pytest.fixture(scope="module")
def trls(small, tmp_path_factory):
    return gradients_of("trl", small, tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("tokens", [300, None])
def test_both_sides_compute_the_same_gradients(tmp_path, small, trls, tokens):
    ours = gradients_of("agentrl", small, tmp_path, dataclasses.replace(TINY, tokens=tokens))
    assert difference(ours, trls) < 1e-5
    assert np.count_nonzero(trls) > 0.9 * trls.size


def test_sides_that_train_on_other_advantages_are_not_compared(tmp_path, small, trls):
    advantages = [small.advantages[0] + 0.01, *small.advantages[1:]]
    ours = gradients_of("agentrl", dataclasses.replace(small, advantages=advantages), tmp_path)
    with pytest.raises(GradientsDiffer, match="differ from TRL's by"):
        difference(ours, trls)


@pytest.mark.parametrize("ours", [[1.0, 1.0002], [1.0, np.nan], [1.0]])
def test_a_difference_of_a_ten_thousandth_ends_the_benchmark(ours):
    theirs = np.ones(2, np.float32)
    assert difference(np.array([1.0, 1.00001], np.float32), theirs) == pytest.approx(1e-5 / 2**0.5, rel=0.05)
    with pytest.raises(GradientsDiffer):
        difference(np.array(ours, np.float32), theirs)


def test_gradients_that_are_all_zero_say_nothing():
    with pytest.raises(GradientsDiffer):
        difference(np.zeros(3, np.float32), np.zeros(3, np.float32))


def test_trl_refuses_a_batch_that_is_no_whole_number_of_micro_batches(tmp_path, small):
    with pytest.raises(ValueError, match="6 episodes"):
        SIDES["trl"](None, 6, 3, TINY, tmp_path, silent)


def test_a_model_of_unknown_sizes_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"--model random:huge.*tiny, qwen2.5-0.5b"):
        make_policy(Setting("random:huge", "cpu", 1, None))


def test_the_synthetic_episodes_share_no_more_than_the_prompts_of_their_groups():
    workload = synthetic()
    assert (len(workload.trajectories), workload.group_size) == (16, 8)
    assert (workload.tokens, workload.trained) == (10_503, 992)
    assert {len(t.turns) for t in workload.trajectories} == {1, 2, 3, 4}
    found = counts(make_policy(TINY), workload)
    # The last token of an episode predicts nothing, and is not read.
    assert found["unique"] == workload.tokens - 14 * 250 - 16


def test_an_instruction_that_all_share_adds_its_tokens_once():
    policy = make_policy(TINY)
    plain, longer = counts(policy, recorded()), counts(policy, instructed())
    assert longer["unique"] == plain["unique"] + 250
    assert longer["tokens"] == plain["tokens"] + 16 * 250
    assert longer["padded"] == plain["padded"] + 16 * 250
    assert longer["trained"] == plain["trained"]


def test_useful_flops_are_those_of_linear_layers_adapters_attention_and_logits():
    workload = recorded()
    found = counts(make_policy(TINY), workload)
    # Query and output, key and value of half the width, gate, up and down of two layers of width 64.
    parameters = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert found["linear_parameters"] == parameters
    assert found["linear_flops"] == 2 * 2 * parameters * found["unique"]
    assert found["adapter_flops"] == 2 * 2 * 2 * 16 * (2 * 128 + 2 * 96 + 3 * 192) * found["unique"]
    inputs = [(*t.prompt_ids, *t.completion_ids)[:-1] for t in workload.trajectories]
    beginnings = {ids[:length] for ids in inputs for length in range(1, len(ids) + 1)}
    assert found["attention_flops"] == 2 * 6 * 2 * 64 * sum(map(len, beginnings))
    assert found["logits_flops"] <= 2 * 2 * 64 * 512 * found["trained"]
    assert useful_flops(found) == sum(found[f"{part}_flops"] for part in ("linear", "adapter", "attention", "logits"))


def test_recorded_episodes_are_kept_as_ids_and_no_more():
    workload = recorded()
    assert record(workload.trajectories)["groups"] == json.loads(RECORDED.read_text())["groups"]
    assert json.loads(RECORDED.read_text())["made_by"] == MADE_BY
    assert MADE_BY[0].startswith("agentrl rollout")
    assert RECORDED.stat().st_size < 300_000
    assert all(workload.advantages)


def test_ids_within_a_vocabulary_keep_the_shapes():
    workload, folded = recorded(), recorded().within(50)
    for t, small in zip(workload.trajectories, folded.trajectories, strict=True):
        assert len(small.prompt_ids) == len(t.prompt_ids)
        assert small.action_mask == t.action_mask
        assert max((*small.prompt_ids, *small.completion_ids)) < 50


def test_the_first_episodes_of_groups_are_groups():
    found = synthetic().first(2)
    assert [t.id for t in found.trajectories] == ["0/0", "0/1", "1/0", "1/1"]
    assert found.advantages == [synthetic().advantages[i] for i in (0, 1, 8, 9)]
    assert found.group_size == 2


def test_rates_and_ratios_are_those_of_the_same_round():
    counted = {"linear_flops": 450, "attention_flops": 150}
    ours = [Measured(2.0, 1.0, 100.0, 50.0, 400.0, counted), Measured(3.0, 2.0, 100.0, 50.0, 300.0, counted)]
    theirs = [Measured(8.0, 5.0, 250.0, 60.0, None, counted), Measured(6.0, 6.0, 300.0, 60.0, None, counted)]
    result = summary({"agentrl": ours, "trl": theirs}, [1e-6, 2e-6])
    assert result["speedup"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert result["processor_speedup"] == {"median": 4.0, "least": 3.0, "most": 5.0}
    assert result["machine_share"]["agentrl"]["least"] == pytest.approx(200 / 300)
    assert result["machine_share"]["trl"]["most"] == pytest.approx(100 / 300)
    assert result["gradient_difference"] == 2e-6
    found = ratios({"b": result, "c": result})
    assert found == {
        "trl_step_shared": 3.0,
        "trl_step_instruct": 3.0,
        "memory": pytest.approx((100 / 250 + 100 / 300) / 2),
        "machine_rate": pytest.approx((200 / 300 + 300 / 400) / 2),
        "machine_rate_linear": pytest.approx((200 / 300 + 300 / 400) / 2 * 0.75),
    }


def test_the_rate_of_products_counts_every_layer_once_forward_and_once_backward(monkeypatch):
    policy, multiplied = make_policy(TINY), []
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.append(2 * a.shape[0] * a.shape[1] * b.shape[1]))
    ticks = iter(range(100))
    monkeypatch.setattr("training_work.time.perf_counter", lambda: float(next(ticks)))
    rate = product_rate(policy, "cpu", silent)
    # A pass lasts from one tick to the next.
    assert rate == sum(multiplied) / 4


def test_a_small_run_writes_times_memory_and_ratios(tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    # Processes of their own would spend a minute on importing the same libraries.
    monkeypatch.setattr(training, "in_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(sys, "argv", ["training.py", "--small", "--workload", "b", "--json", str(file)])
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TQDM_DISABLE", "TRL_EXPERIMENTAL_SILENCE"):
        monkeypatch.setenv(name, "1")
    training.main()
    report = json.loads(file.read_text())
    assert set(report["ratios"]) == {"trl_step_shared", "memory", "machine_rate", "machine_rate_linear"}
    result = report["workloads"]["b"]
    assert result["counts"]["episodes"] == 8
    assert result["gradient_difference"] < 1e-5
    for (step,) in result["steps"].values():
        assert step["mib"] >= step["mib_before"] > 0
        assert step["seconds"] > 0
    assert "workload b, round 1 of 1: agentrl" in capsys.readouterr().out


def test_an_unknown_workload_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--workload", "a,z"])
    with pytest.raises(SystemExit):
        training.main()
    assert "--workload z: there are a, b, c" in capsys.readouterr().err
