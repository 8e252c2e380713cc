"""How the parts of ``benchmark.py`` take the time."""

import time
from collections.abc import Callable
from typing import Any


def time_in_turn(
    ours: Callable[[], Any], stock: Callable[[], Any], repetitions: int
) -> tuple[list[float], list[float]]:
    """Run both ``repetitions`` times, in turn, and return the seconds of each run."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for side, run in zip(times, (ours, stock), strict=True):
            start = time.perf_counter()
            run()
            side.append(time.perf_counter() - start)
    return times
