"""What a rollout worker says when it cannot start."""

import asyncio

import pytest

from agentrl.config import parse_config
from agentrl.rollout.worker import RolloutWorker
from agentrl.types import EngineDied
from retrievers.base import RetrieverError


class Unreachable:
    async def __aenter__(self):
        raise RetrieverError("nobody listens")

    async def __aexit__(self, *exception):
        raise AssertionError("it was never entered")


def test_a_retriever_that_does_not_start_is_a_death_that_the_pool_can_count():
    config = parse_config(
        {
            "name": "small",
            "model": {"path": "some/model"},
            "retriever": {"kind": "object", "target": f"{__name__}:Unreachable"},
        },
        source="test",
    )

    async def start():
        worker = RolloutWorker(config, "", [])
        try:
            await worker.prepare()
        finally:
            await worker.close()

    with pytest.raises(EngineDied, match="its retriever does not start: nobody listens"):
        asyncio.run(start())
