"""Drawn ids have the distribution that was asked for, and each row has its own randomness."""

import pytest
import torch
from chi_square import chi_square_bound, chi_square_statistic

from agentrl.engines.drawing import draw


def generators(rows, start=0):
    return {row: torch.Generator().manual_seed(start + row) for row in range(rows)}


def softmax(rows, vocabulary, seed=0):
    return (3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("vocabulary", [1, 7, 256, 300, 2_048])
def test_ids_are_drawn_with_their_probabilities(vocabulary):
    draws = 20_000
    probabilities = softmax(1, vocabulary)
    drawn = draw(probabilities.expand(draws, -1), generators(draws))
    statistic, freedom = chi_square_statistic(drawn.bincount(minlength=vocabulary), draws * probabilities[0])
    assert statistic <= chi_square_bound(freedom)


def test_rows_without_a_generator_are_drawn_with_their_probabilities_too():
    torch.manual_seed(0)
    probabilities = softmax(1, 300)
    drawn = draw(probabilities.expand(20_000, -1), generators(10_000))[10_000:]
    statistic, freedom = chi_square_statistic(drawn.bincount(minlength=300), 10_000 * probabilities[0])
    assert statistic <= chi_square_bound(freedom)


def test_a_row_draws_the_same_alone_and_among_others():
    probabilities = softmax(8, 1_000)
    among = draw(probabilities, generators(8))
    for row in range(8):
        alone = draw(probabilities[row : row + 1], {0: torch.Generator().manual_seed(row)})
        assert alone.tolist() == [among[row]]


def test_each_draw_of_a_generator_is_another():
    uniform, generator = torch.full((1, 1_000), 1e-3), {0: torch.Generator().manual_seed(0)}
    assert len({draw(uniform, generator).item() for _ in range(20)}) > 15


def test_an_id_without_probability_is_never_drawn():
    probabilities = torch.zeros(5_000, 1_000)
    probabilities[:, [3, 255, 256, 999]] = torch.tensor([1e-30, 0.5, 0.25, 0.25])
    assert set(draw(probabilities, generators(5_000)).tolist()) <= {3, 255, 256, 999}


def test_rounding_leaves_the_ids_as_they_are():
    """Batches of another size round otherwise. An inverted cumulative distribution gives 40 other ids here."""
    logits = 15 + 3 * torch.randn(1_000, 20_000, generator=torch.Generator().manual_seed(0))
    rounded = logits * (1 + 1e-5 * torch.randn(1_000, 20_000, generator=torch.Generator().manual_seed(1)))
    first, second = (draw(values.softmax(-1), generators(1_000)) for values in (logits, rounded))
    assert first.tolist() == second.tolist()
