"""The queue behind the page: order, its limit, and an end at the next step."""

import threading

import pytest

from dynaip_jax.app.turns import CANCELLED, DONE, FAILED, WAITING, WORKING, Turns
from dynaip_jax.errors import UserError

SOON = 20  # seconds, of what takes moments


@pytest.fixture
def turns():
    made = Turns(3)
    yield made
    made.close()


class Held:
    """Work that goes on until it is let go; its steps are counted."""

    def __init__(self):
        self.began, self.free, self.steps = threading.Event(), threading.Event(), 0

    def __call__(self, job):
        for n in range(1000):
            job.step(n + 1, 1000, f"shown {n}")
            self.steps = n + 1
            self.began.set()
            if self.free.wait(0.01):
                return "made"
        return None


def over(turns, job):
    """Its last snapshot."""
    for _ in range(SOON * 100):
        if (now := turns.snapshot(job)).state not in (WAITING, WORKING):
            return now
        threading.Event().wait(0.01)
    raise AssertionError("goes on")


def test_jobs_are_done_in_order_and_more_than_the_limit_are_refused(turns):
    held, done = Held(), []
    first = turns.submit(held)
    assert held.began.wait(SOON)
    waiting = [turns.submit(lambda job, n=n: done.append(n) or n) for n in range(3)]
    assert [turns.snapshot(job).ahead for job in waiting] == [1, 2, 3]
    now = turns.snapshot(first)
    assert (now.state, now.steps) == (WORKING, 1000) and now.shown.startswith("shown")
    with pytest.raises(UserError, match="queue: 3 pictures wait already; expected fewer than 4; try again in a minute"):
        turns.submit(held)
    held.free.set()
    assert [over(turns, job).result for job in (first, *waiting)] == ["made", 0, 1, 2] and done == [0, 1, 2]


def test_a_cancelled_job_ends_at_its_next_step_and_makes_room(turns):
    held, after = Held(), []
    job = turns.submit(held)
    assert held.began.wait(SOON)
    waiting = [turns.submit(lambda job: after.append(1)) for _ in range(3)]
    waiting[1].cancel()
    turns.submit(lambda job: after.append(2))  # in the place of the one that left
    assert turns.snapshot(waiting[1]).state == CANCELLED
    assert turns.snapshot(waiting[2]).ahead == 2
    before = held.steps
    job.cancel()
    assert over(turns, job).state == CANCELLED and held.steps <= before + 1
    assert [over(turns, job).state for job in (waiting[0], waiting[2])] == [DONE, DONE] and after[:2] == [1, 1]
    job.cancel()  # nothing, once it is over
    assert turns.snapshot(job).state == CANCELLED


def test_what_fails_is_told_and_the_next_is_done(turns, capfd):
    def of(error):
        def work(job):
            raise error

        return over(turns, turns.submit(work)).error

    assert str(of(UserError("`steps` 0: expected more"))) == "`steps` 0: expected more"
    assert "no space" in str(of(OSError(28, "no space", "a.png")))
    assert "a fault of the program (division by zero)" in str(of(ZeroDivisionError("division by zero")))
    assert "ZeroDivisionError" in capfd.readouterr().err
    job = turns.submit(lambda job: 5)
    assert over(turns, job).result == 5 and turns.snapshot(job).state != FAILED
