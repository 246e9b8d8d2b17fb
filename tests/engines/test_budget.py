"""The budget never holds more than it has, lets nobody past a large request, and loses nothing to who gives up."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from agentrl.engines.budget import TokenBudget


@given(
    budget=st.integers(1, 20),
    asks=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.booleans()), max_size=25),
)
def test_no_more_than_the_budget_is_held_and_everyone_who_stays_gets_a_turn(budget, asks):
    async def scenario():
        tokens = TokenBudget(budget)
        held, order = 0, []

        async def hold(number, wanted, steps):
            nonlocal held
            async with tokens.hold(wanted):
                held += min(wanted, budget)
                order.append(number)
                assert held <= budget
                for _ in range(steps):
                    await asyncio.sleep(0)
                held -= min(wanted, budget)

        tasks = []
        for number, (wanted, steps, gives_up) in enumerate(asks):
            tasks.append(asyncio.create_task(hold(number, wanted, steps)))
            await asyncio.sleep(0)
            if gives_up and tasks[-1].cancel():
                held -= min(wanted, budget) if order[-1:] == [number] else 0
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        stayed = [number for number, (_, _, gives_up) in enumerate(asks) if not gives_up]
        assert sorted(number for number in order if number in stayed) == stayed
        assert all(tasks[number].exception() is None for number in stayed)
        # Nothing was lost: the whole budget can be had at once.
        await asyncio.wait_for(hold(-1, budget, 0), 1)

    asyncio.run(scenario())


def test_a_large_request_is_not_passed_by_small_ones_that_come_later():
    async def scenario():
        tokens = TokenBudget(10)
        order = []

        async def hold(name, wanted):
            async with tokens.hold(wanted):
                order.append(name)
                await asyncio.sleep(0.01)

        await asyncio.gather(hold("first", 6), hold("large", 9), hold("small", 2), hold("smaller", 1))
        assert order == ["first", "large", "small", "smaller"]

    asyncio.run(scenario())
