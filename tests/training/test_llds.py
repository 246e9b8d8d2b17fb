"""LLDS on tensors: by hand, against plain Python, and where it must not act."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentrl.training.llds import displacement

TOLERANCE = 2**-8


def tensors(logps, old_logps, advantages, own, turns):
    return {
        "logps": torch.tensor(logps, dtype=torch.float64, requires_grad=True),
        "old_logps": torch.tensor(old_logps, dtype=torch.float64),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "own": torch.tensor(own),
        "turn_index": torch.tensor(turns),
    }


def by_hand():
    """One episode of A > 0: its first action fell by 0.1 a token, its second rose, and one of A < 0 that fell alike."""
    return tensors(
        logps=[[-1.5, -0.8, -9.0, -0.5, -2.0], [-1.5, -0.8, -9.0, -0.5, -2.0]],
        old_logps=[[-1.0, -1.1, 0.0, -1.0, -1.9], [-1.0, -1.1, 0.0, -1.0, -1.9]],
        advantages=[0.5, -0.5],
        own=[[True, True, False, True, True]] * 2,
        turns=[[0, 0, 0, 1, 1]] * 2,
    )


def test_by_hand_only_the_fallen_tokens_of_the_fallen_action_count():
    found = displacement(**by_hand(), tolerance=0.05)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, 0] = 0.5
    assert torch.allclose(found.penalty, expected)
    assert (found.actions.item(), found.fallen.item()) == (2, 1)


def test_a_fall_within_the_tolerance_counts_as_unchanged():
    found = displacement(**by_hand(), tolerance=0.15)
    assert found.penalty.sum() == 0
    assert (found.actions.item(), found.fallen.item()) == (2, 0)


def test_the_gradient_raises_the_fallen_tokens_and_no_other():
    inputs = by_hand()
    displacement(**inputs, tolerance=0.05).penalty.sum().backward()
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, 0] = -1.0
    assert torch.equal(inputs["logps"].grad, expected)


def test_a_token_of_a_fallen_action_that_did_not_change_has_no_gradient():
    inputs = by_hand()
    inputs["old_logps"][0, 1] = inputs["logps"][0, 1].detach()
    displacement(**inputs, tolerance=0.05).penalty.sum().backward()
    assert inputs["logps"].grad[0, :2].tolist() == [-1.0, 0.0]


def test_an_advantage_of_zero_is_preserved_too():
    inputs = by_hand() | {"advantages": torch.zeros(2)}
    assert displacement(**inputs, tolerance=0.05).penalty[:, 0].tolist() == pytest.approx([0.5, 0.5])


def test_advantages_by_token_gate_by_token():
    inputs = by_hand() | {"advantages": torch.tensor([[-1.0, -1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0, -1.0]])}
    found = displacement(**inputs, tolerance=0.05)
    assert found.penalty[:, 0].tolist() == pytest.approx([0.0, 0.5])
    assert found.penalty[:, 1:].sum() == 0
    assert (found.actions.item(), found.fallen.item()) == (2, 1)


def test_an_episode_that_is_not_trained_counts_nowhere():
    inputs = by_hand()
    inputs["own"][0] = False
    found = displacement(**inputs, tolerance=0.05)
    assert found.penalty.sum() == 0
    assert (found.actions.item(), found.fallen.item()) == (0, 0)


def test_equal_log_probabilities_have_no_penalty_even_without_a_tolerance():
    inputs = by_hand()
    inputs["old_logps"] = inputs["logps"].detach()
    displacement(**inputs, tolerance=0.0).penalty.sum().backward()
    assert inputs["logps"].grad.abs().sum() == 0


def test_what_stands_outside_the_mask_need_not_be_finite():
    inputs = by_hand()
    with torch.no_grad():
        inputs["logps"][~inputs["own"]] = float("-inf")
    inputs["old_logps"][~inputs["own"]] = float("nan")
    found = displacement(**inputs, tolerance=0.05)
    found.penalty.sum().backward()
    assert found.penalty.sum().item() == pytest.approx(0.5)
    assert inputs["logps"].grad.isfinite().all()


def reference(logps, old_logps, advantages, own, turns, tolerance):
    """The same in plain Python: the penalty of each token, and for each gated action whether it fell."""
    penalty = [[0.0] * len(row) for row in logps]
    verdicts = []
    for row, advantage in enumerate(advantages):
        if advantage < 0:
            continue
        for turn in set(turns[row]):
            places = [i for i, t in enumerate(turns[row]) if t == turn and own[row][i]]
            if not places:
                continue
            falls = [old_logps[row][i] - logps[row][i] for i in places]
            verdicts.append(sum(falls) / len(falls) > tolerance)
            if verdicts[-1]:
                for i, fall in zip(places, falls, strict=True):
                    penalty[row][i] = max(0.0, fall)
    return penalty, verdicts


# Multiples of 1/64 leave no rounding, so that both sides agree on what exceeds the tolerance.
log_probabilities = st.integers(-256, 0).map(lambda n: n / 64)


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 8))

    def table(values):
        return draw(st.lists(st.lists(values, min_size=width, max_size=width), min_size=rows, max_size=rows))

    steps = table(st.integers(0, 1))
    return (
        table(log_probabilities),
        table(log_probabilities),
        draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=rows, max_size=rows)),
        table(st.booleans()),
        [[sum(row[1 : i + 1]) for i in range(width)] for row in steps],
    )


@given(batches())
def test_it_agrees_with_plain_python(batch):
    found = displacement(**tensors(*batch), tolerance=TOLERANCE)
    penalty, verdicts = reference(*batch, TOLERANCE)
    assert found.penalty.tolist() == penalty
    assert (found.actions.item(), found.fallen.item()) == (len(verdicts), sum(verdicts))


@given(batches(), st.integers(1, 3))
def test_padding_changes_nothing(batch, extra):
    plain = displacement(**tensors(*batch), tolerance=TOLERANCE)
    logps, old_logps, advantages, own, turns = batch
    padded = displacement(
        **tensors(
            [[*row, *[-3.0] * extra] for row in logps],
            [[*row, *[0.0] * extra] for row in old_logps],
            advantages,
            [[*row, *[False] * extra] for row in own],
            [[*row, *[0] * extra] for row in turns],
        ),
        tolerance=TOLERANCE,
    )
    assert torch.equal(padded.penalty[:, :-extra], plain.penalty)
    assert padded.penalty[:, -extra:].sum() == 0
    assert (padded.actions, padded.fallen) == (plain.actions, plain.fallen)
