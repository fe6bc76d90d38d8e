"""Prepare items ahead of time in a thread; pinned memory."""

import queue
import threading
from typing import Any, Callable

import torch


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in pinned memory, which a GPU reads while it computes; the tensor itself where the system grants no
    more such memory (WSL2 has little, and checkpoints need some)."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor


class Prefetcher:
    """make(index), make(index + 1), ... in order, prepared by a thread that starts with the first next()."""

    def __init__(self, make: Callable[[int], Any], depth: int = 4):
        """make: returns item number `index`. depth: number of items to prepare ahead."""
        self.make, self.depth, self.thread = make, depth, None

    def next(self, index: int) -> Any:
        """Return item number `index`, which must follow the one before, unless close() was called in between.

        Raises: what make() raised. The next call tries again.
        """
        if self.thread is None:
            self.items, self.stop = queue.Queue(self.depth), threading.Event()
            self.thread = threading.Thread(target=self._fill, args=(index, self.items, self.stop), daemon=True)
            self.thread.start()
        item = self.items.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        return item

    def _fill(self, index: int, items: queue.Queue, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                item = self.make(index)
            except Exception as error:  # next() raises it again in the caller's thread
                item = error
            while not stop.is_set():
                try:
                    items.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            index += 1

    def close(self) -> None:
        """Stop the thread, and forget what it has prepared."""
        if self.thread is not None:
            self.stop.set()
            self.thread.join()
            self.thread = None
