"""Workers: who measures the shares of a comparison, processes or Ray's tasks; a share that is lost is done again.

A share is one weight, with the numbers of all adapters that change it: each number goes out once, and workers read no
files but the base's. Nothing heavy is imported here: a worker says how many threads it may have before NumPy is loaded.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from lorastack.errors import ArgumentError, LoraStackError, require

if TYPE_CHECKING:
    from lorastack.algebra.share import Measured, Runner, Share

#: So often a share may be lost with its worker: a worker that the system ended for its memory's sake takes along those
#: that others had.
MOST_LOSSES = 3
#: Seconds.
_REACHED_WITHIN = 10
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class _Packed(NamedTuple):
    number: int
    weight: str
    raw: bytes


def processes(count: int) -> Runner:
    """A runner with so many processes, for `lorastack.algebra.compare.compare`.

    A script that calls it needs ``if __name__ == "__main__":`` around what it does, as all have that start processes.

    Raises
    ------
    ArgumentError
        When ``count`` is below 1; later, when a share was lost with its process four times.
    """
    if count < 1:
        raise ArgumentError(f"workers is {count}, expected 1 or more")
    return lambda shares: _in_processes(shares, count)


def _in_processes(shares: Iterable[Share], count: int) -> Iterator[Measured]:
    left = _Left(shares)
    while left:
        threads = max(1, (os.cpu_count() or 1) // count)
        # Spawned: a fork has the locks of its parent's threads, held by nobody.
        with ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin, initargs=(threads,)) as pool:
            running: dict[Future[Any], _Packed] = {}
            broken = False
            while not broken and (running or left):
                # One more than there are processes, so that none waits for its next.
                while len(running) <= count and (item := left.next()) is not None:
                    if not isinstance(item, _Packed):
                        yield item
                        continue
                    try:
                        running[pool.submit(measure, item.raw)] = item
                    except BrokenProcessPool:
                        left.lost(item)
                        broken = True
                        break
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    item = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        left.lost(item)
                        broken = True
                    else:
                        yield future.result()
            for future, item in running.items():  # of a pool that is broken
                if future.done() and future.exception() is None:
                    yield future.result()
                else:
                    left.lost(item)


def on_ray(address: str) -> Runner:
    """A runner with the tasks of a Ray cluster; ``local`` starts one on this machine.

    Every node needs this package, and the base, where one is given, at the same place.

    Raises
    ------
    MissingDependencyError
        Without Ray.
    LoraStackError
        When there is no such cluster.
    """
    ray: Any = require("ray", "ray")
    return lambda shares: _on_ray(ray, shares, address)


def _on_ray(ray: Any, shares: Iterable[Share], address: str) -> Iterator[Measured]:
    began = not ray.is_initialized()
    if began:
        try:
            _reach(address)
            ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="ERROR")
        except OSError as error:
            raise LoraStackError(f"there is no Ray cluster at {address}: {error}") from error
    try:
        task = ray.remote(max_retries=MOST_LOSSES)(measure)  # Ray does a lost share again by itself
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        left = _Left(shares)
        running: list[Any] = []
        while running or left:
            while len(running) < most and (item := left.next()) is not None:
                if isinstance(item, _Packed):
                    running.append(task.remote(item.raw))
                else:
                    yield item
            if running:
                done, running = ray.wait(running, num_returns=1)
                yield ray.get(done[0])
    finally:
        if began:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nobody listens: Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), _REACHED_WITHIN).close()


class _Left:
    """The shares that nobody has yet, those that were lost before new ones."""

    def __init__(self, shares: Iterable[Share]) -> None:
        self._shares = iter(shares)
        self._again: deque[_Packed] = deque()
        self._losses: Counter[int] = Counter()
        self._ended = False

    def __bool__(self) -> bool:
        return bool(self._again) or not self._ended

    def next(self) -> _Packed | Measured | None:
        """The next share; measured already where its numbers cannot be read, which says why; None after the last."""
        if self._again:
            return self._again.popleft()
        share = next(self._shares, None)
        if share is None:
            self._ended = True
            return None
        try:
            return _Packed(share.number, share.weight, pickle.dumps(share.portable(), pickle.HIGHEST_PROTOCOL))
        except ArgumentError:
            raise
        except LoraStackError:  # NaN, a file that was changed: as in this process
            return share.measured(only_read=True)

    def lost(self, item: _Packed) -> None:
        """Its worker ended before it was done."""
        self._losses[item.number] += 1
        if self._losses[item.number] > MOST_LOSSES:
            raise LoraStackError(
                f"{item.weight}: its worker ended {self._losses[item.number]} times, most likely for lack of memory; "
                "take fewer workers, or fewer adapters"
            )
        self._again.append(item)


def measure(raw: bytes) -> Measured:
    """Measure one share, in a worker."""
    share: Share = pickle.loads(raw)
    return share.measured()


def _begin(threads: int) -> None:
    for name in _THREADS:
        os.environ.setdefault(name, str(threads))
