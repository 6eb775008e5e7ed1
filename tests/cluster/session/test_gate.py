"""The gate: order, bounds, cancellation."""

import asyncio
import contextlib

import pytest

from phi_cluster.cluster.session.gate import Entry, Gate, GateTimeout


def make_gate(reap=lambda: None, **options):
    return Gate(reap, **{"poll_seconds": 0.001} | options)


async def settle():
    """Let everybody run until they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_at_a_time_in_the_order_of_arrival():
    gate = make_gate()
    assert await gate.enter("a", 0) is Entry.ENTERED
    order = []

    async def pass_through(name):
        assert await gate.enter(name, 10) is Entry.ENTERED
        order.append(name)
        gate.release()

    tasks = [asyncio.create_task(pass_through(name)) for name in "bcd"]
    await settle()
    assert order == []
    assert gate.num_waiting == 3
    gate.release()
    # Who comes in the same moment goes behind those who wait.
    late = asyncio.create_task(pass_through("late"))
    await asyncio.gather(*tasks, late)
    assert order == ["b", "c", "d", "late"]
    assert not gate.held


async def test_first_goes_before_the_others():
    gate = make_gate()
    await gate.enter("a", 0)
    tasks = [asyncio.create_task(gate.enter("b", 10)), asyncio.create_task(gate.enter("c", 10, first=True))]
    await settle()
    gate.release()
    await settle()
    assert [task.done() for task in tasks] == [False, True]
    gate.release()
    assert await tasks[0] is Entry.ENTERED


async def test_waiting_is_bounded_in_time_and_number():
    gate = make_gate(max_waiting=1)
    await gate.enter("a", 0)
    with pytest.raises(GateTimeout):
        await gate.enter("b", 0)
    with pytest.raises(GateTimeout):
        await gate.enter("b", 0.003)
    waiting = asyncio.create_task(gate.enter("c", 10))
    await settle()
    with pytest.raises(GateTimeout):
        await gate.enter("d", 10)
    assert gate.num_waiting == 1
    gate.release()
    assert await waiting is Entry.ENTERED


async def test_a_cancelled_one_leaves_the_queue():
    gate = make_gate()
    await gate.enter("a", 0)
    waiting = asyncio.create_task(gate.enter("b", 10))
    await settle()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert gate.num_waiting == 0
    gate.release()
    assert not gate.held


async def test_one_cancelled_in_the_moment_of_entering_passes_the_gate_on():
    gate = make_gate()
    await gate.enter("a", 0)
    waiting = asyncio.create_task(gate.enter("b", 10))
    after = asyncio.create_task(gate.enter("c", 10))
    await settle()
    gate.release()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert waiting.cancelled()
    assert await after is Entry.ENTERED
    gate.release()
    assert not gate.held


async def test_those_who_wait_look_after_the_holder():
    alive = True

    def reap():
        if not alive and gate.held:
            gate.release()

    gate = make_gate(reap)
    await gate.enter("a", 0)
    waiting = asyncio.create_task(gate.enter("b", 10))
    await settle()
    assert not waiting.done()
    alive = False
    assert await asyncio.wait_for(waiting, 5) is Entry.ENTERED


async def test_closing_ends_all_waiting():
    gate = make_gate()
    await gate.enter("a", 0)
    waiting = [asyncio.create_task(gate.enter(name, 10)) for name in "bc"]
    await settle()
    gate.close()
    assert [await task for task in waiting] == [Entry.CLOSED, Entry.CLOSED]
    assert await gate.enter("d", 10) is Entry.CLOSED
    gate.release()
    assert not gate.held


async def test_withdrawing_ends_one_waiting():
    gate = make_gate()
    await gate.enter("a", 0)
    waiting = asyncio.create_task(gate.enter("b", 10))
    await settle()
    assert not gate.withdraw("a")
    assert gate.withdraw("b")
    assert await waiting is Entry.WITHDRAWN
    assert not gate.withdraw("b")
    gate.release()
    assert not gate.held
