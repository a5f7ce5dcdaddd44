"""Processes that are killed at random moments while they write."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

KILLS = 20
MOST = 60
"""A busy machine may need more kills until one lands on either side of the moment that counts."""


def forked(work: Callable[[], object]) -> int:
    """Runs a function in a process of its own, silently; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            work()
        finally:
            os._exit(0)
    return child


def killed_again_and_again(works: list[Callable[[], object]], look: Callable[[], object]) -> None:
    """Runs and kills two functions in turn, which change a place, until both of its states have been seen.

    Args:
        works: what leaves the place in one state, and in the other.
        look: at the place: what state it is in; it must be one of the two, and may raise where it is neither.
    """
    states, durations = [], []
    for work in works:
        started = time.perf_counter()
        os.waitpid(forked(work), 0)
        durations.append(time.perf_counter() - started)
        states.append(look())
    assert states[0] != states[1]
    chance, seen, kills = random.Random(0), set(), 0
    while kills < KILLS or (len(seen) < 2 and kills < MOST):
        child = forked(works[kills % 2])
        time.sleep(chance.uniform(0, 1.2 + kills // KILLS) * max(durations))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(states.index(look()))
        kills += 1
    assert seen == {0, 1}
