"""A made-up world, and the tokenizer of its names."""

import pytest

from agentrl.demo.sources import load_world
from agentrl.pocket.demonstrations import make_up
from agentrl.pocket.worlds import names_of


@pytest.fixture(scope="session")
def names():
    return names_of(load_world())


@pytest.fixture(scope="session")
def made_up(names):
    return make_up(names, 1)
