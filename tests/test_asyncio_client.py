from __future__ import annotations

import asyncio

import pytest

from tests.test_client import DEADLINE_SECONDS, QUICK, Server, registration, state
from throttle.asyncio_client import AsyncThrottleClient


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "throttle.sock")
    yield server
    server.stop()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, DEADLINE_SECONDS))


async def played(server):
    """The next stream, without holding up the loop."""
    return (await asyncio.to_thread(server.stream)).accept()


def test_states_are_sent_and_decisions_are_waited_for_without_blocking_the_loop(server):
    server.start()

    async def main():
        async with AsyncThrottleClient(registration(), server.target, backoff=QUICK) as client:
            stream = await played(server)
            assert await client.wait_until_connected(DEADLINE_SECONDS)
            assert client.connected
            client.submit(state(1))
            assert await asyncio.to_thread(stream.read) == state(1)
            waiting = asyncio.create_task(client.wait_for_decision(1, DEADLINE_SECONDS))
            await asyncio.sleep(0)
            assert not waiting.done()
            stream.decide(1)
            decision = await waiting
            assert decision.target_clock_mhz == 900
            assert client.latest_decision == decision
            assert client.statistics.decisions_count == 1
            stream.end()

    run(main())


def test_waits_end_at_their_timeout_and_spare_the_other_waiters(server):
    server.start()

    async def main():
        client = AsyncThrottleClient(registration(), server.target, backoff=QUICK)
        stream = await played(server)
        long = asyncio.create_task(client.wait_for_decision(1, DEADLINE_SECONDS))
        assert await client.wait_for_decision(1, 0.01) is None
        stream.decide(1)
        assert (await long).sequence_number == 1
        stream.end()
        await client.close()

    run(main())


def test_decisions_come_one_by_one_until_the_client_is_closed(server):
    server.start()

    async def main():
        client = AsyncThrottleClient(registration(), server.target, backoff=QUICK)
        stream = await played(server)

        async def read():
            return [decision.sequence_number async for decision in client.decisions()]

        reader = asyncio.create_task(read())
        for number in (1, 2, 3):
            stream.decide(number)
            await client.wait_for_decision(number, DEADLINE_SECONDS)
        stream.end()
        await client.close()
        seen = await reader
        assert seen == sorted(set(seen))
        assert seen[-1] == 3

    run(main())


def test_an_absent_daemon_costs_a_timeout_and_no_error(server):
    async def main():
        async with AsyncThrottleClient(registration(), server.target, backoff=QUICK) as client:
            for number in range(1, 101):
                client.submit(state(number))
            assert not await client.wait_until_connected(0.05)
            assert client.statistics.submitted_count == 100
            assert client.accepted is None

    run(main())


def test_a_loop_is_needed():
    with pytest.raises(RuntimeError):
        AsyncThrottleClient(registration())
