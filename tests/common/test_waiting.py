"""How long threads wait for a core."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from unetpp_fast.common import waiting
from unetpp_fast.common.waiting import computed_and_waited, share_waited

needs_linux = pytest.mark.skipif(
    not (sys.platform == "linux" and any(computed_and_waited())), reason="the system does not count how long threads wait"
)


@needs_linux
def test_two_threads_on_one_core_wait_half_of_the_time():
    """Threads that hold no lock in common: each hashes a large buffer."""
    import hashlib

    before, buffer = os.sched_getaffinity(0), bytes(2**24)
    began = computed_and_waited()
    try:
        os.sched_setaffinity(0, {min(before)})
        threads = [threading.Thread(target=lambda: [hashlib.sha256(buffer) for _ in range(6)]) for _ in range(2)]
        for thread in threads:
            thread.start()
        while all(thread.is_alive() for thread in threads):
            time.sleep(0.02)
            share = share_waited(began)  # before they end, and are counted no more
    finally:
        os.sched_setaffinity(0, before)
        for thread in threads:
            thread.join()
    assert share > 0.3


def test_nothing_is_doubted_where_the_system_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "TASKS", tmp_path)
    assert computed_and_waited() == (0, 0) and share_waited((0, 0)) == 0.0
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "schedstat").write_text("nothing\n")
    assert share_waited((0, 0)) == 0.0
    (tmp_path / "7" / "schedstat").write_text("300 100 5\n")
    assert share_waited((0, 0)) == 0.25
    assert share_waited((400, 0)) == 1.0  # a thread that had computed has ended
