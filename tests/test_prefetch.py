"""prefetch.py: items in order, prepared ahead by a thread; errors; an end and another start."""

import threading
import time

import pytest
import torch

from nanofp8.prefetch import Prefetcher, pinned


def test_items_come_in_order_and_no_more_than_depth_ahead():
    made = []
    prefetcher = Prefetcher(lambda index: made.append(index) or index * index, depth=3)
    assert not made and threading.active_count() == len(threading.enumerate())  # nothing starts before the first next()
    for index in range(5, 25):
        assert prefetcher.next(index) == index * index
        # one more waits in the thread for room in the queue
        assert made == list(range(5, 5 + len(made))) and len(made) <= index - 5 + 1 + 3 + 1
    prefetcher.close()


def test_items_are_made_while_nobody_asks():
    made = []
    prefetcher = Prefetcher(lambda index: made.append(index) or index, depth=2)
    assert prefetcher.next(0) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made[:3] == [0, 1, 2]
    prefetcher.close()


def test_an_error_comes_after_the_items_before_it_and_the_next_call_tries_again():
    attempts = []

    def make(index):
        if index == 2:
            attempts.append(index)
            if len(attempts) == 1:
                raise ValueError("item 2")
        return index

    prefetcher = Prefetcher(make)
    assert [prefetcher.next(0), prefetcher.next(1)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        prefetcher.next(2)
    assert [prefetcher.next(2), prefetcher.next(3)] == [2, 3]
    prefetcher.close()


def test_close_ends_the_thread_and_a_later_call_starts_anywhere():
    before = threading.active_count()
    prefetcher = Prefetcher(lambda index: index)
    assert prefetcher.next(0) == 0 and threading.active_count() == before + 1
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before
    assert [prefetcher.next(7), prefetcher.next(8)] == [7, 8]  # what was prepared before is forgotten
    prefetcher.close()


def test_a_tensor_stays_as_it_is_where_no_pinned_memory_is_granted(monkeypatch):
    def refuse(self):
        raise RuntimeError("CUDA error: out of memory")
    tensor = torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert pinned(tensor) is tensor
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    assert pinned(tensor).equal(tensor) and pinned(tensor) is not tensor
