"""Threads where there is waiting, and only there."""

import threading
import time

from localdit.training.data.parallel import THREADS, map_reads


def threads_of(function, number):
    seen = []

    def record(item):
        seen.append(threading.get_ident())
        function()
        return -item

    assert list(map_reads(record, range(number))) == [-item for item in range(number)]
    return len({*seen})


def test_waiting_is_done_together():
    start = time.perf_counter()
    assert 1 < threads_of(lambda: time.sleep(0.01), 160) <= THREADS + 1
    assert time.perf_counter() - start < 0.8  # 1.6 s one after the other


def test_work_is_done_alone():
    assert threads_of(lambda: sum(range(50_000)), 20) == 1


def test_nothing():
    assert list(map_reads(str, [])) == []
