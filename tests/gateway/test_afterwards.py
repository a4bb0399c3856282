"""Work that waits until answers are on their way: when it is done, in what order, and what one failure means."""

import asyncio

from marginroute.adapters.afterwards import LATER_S, Afterwards


def broken():
    raise ValueError("broken")


def test_pieces_are_done_together_in_their_order():
    done, problems = [], []
    afterwards = Afterwards(problems.append)

    async def run():
        for piece in (partial_of(done, 1), broken, partial_of(done, 2)):
            afterwards.add(piece)
        await asyncio.sleep(0)
        early = list(done)
        await asyncio.sleep(1.5 * LATER_S)
        return early

    assert asyncio.run(run()) == []
    assert done == [1, 2] and [str(problem) for problem in problems] == ["broken"]


def test_what_a_loop_that_is_gone_has_left_is_done_by_the_next_one():
    done = []
    afterwards = Afterwards(print)

    async def run(piece, wait_s):
        afterwards.add(partial_of(done, piece))
        await asyncio.sleep(wait_s)

    asyncio.run(run(1, 0.0))
    assert done == []
    asyncio.run(run(2, 1.5 * LATER_S))
    assert done == [1, 2]


def test_without_a_loop_and_at_the_end_nothing_waits():
    done = []
    afterwards = Afterwards(print)
    afterwards.add(partial_of(done, 1))
    assert done == [1]

    async def run():
        afterwards.add(partial_of(done, 2))

    asyncio.run(run())
    afterwards.stop()
    assert done == [1, 2]


def partial_of(done, piece):
    return lambda: done.append(piece)
