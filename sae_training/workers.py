"""Threads that share a step: each works on its own rows, with one PyTorch thread of its own.

Pieces of the same batch go through encoder, selection and decoder in one thread while they are in its cache. PyTorch's
own threads would have to meet after every operation, and spin in between on the cores that the kernels need.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Workers:
    """`count` threads (default: as many as PyTorch uses). Use as a context."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or torch.get_num_threads()

    def __enter__(self) -> Workers:
        threads, meet = torch.get_num_threads(), Barrier(self.count)
        self._pool = ThreadPoolExecutor(self.count)

        def start(_: int) -> None:
            meet.wait()  # so that every thread of the pool comes here once
            torch.set_num_threads(1)

        list(self._pool.map(start, range(self.count)))
        torch.set_num_threads(threads)  # what threads that others start will find
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def share(self, n: int, work: Callable[[int, int, int], T]) -> list[T]:
        """work(worker, first, last) on equal parts of range(n), one a thread; the results in order."""
        cuts = [n * i // self.count for i in range(self.count + 1)]
        return list(self._pool.map(work, range(self.count), cuts, cuts[1:]))
