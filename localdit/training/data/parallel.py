"""Reading many things, several at a time where reading means waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 16
PATIENCE = 2.0  # seconds of waiting to each second of work from which on threads pay
NOTABLE = 0.1  # seconds; less waiting than this tells nothing

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_reads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function to items, in their order; with threads once it has waited more than worked.

    Threads hide the latency of network storage. Where files are at hand they would contend for the
    interpreter, and take twice as long as one alone.
    """
    rest = iter(items)
    waited = worked = 0.0
    for item in rest:
        start, cpu = time.perf_counter(), time.thread_time()
        result = function(item)
        cpu = time.thread_time() - cpu
        worked += cpu
        waited += time.perf_counter() - start - cpu
        yield result
        if waited > max(NOTABLE, PATIENCE * worked):
            with ThreadPoolExecutor(THREADS) as pool:
                yield from pool.map(function, rest)
