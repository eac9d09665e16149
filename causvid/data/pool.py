"""Worker processes that survive inputs which crash or hang them. Imports no torch: workers start in a moment."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from causvid.errors import UserError

Item = TypeVar("Item")


class Refused(Exception):
    """Why one input is put aside; the others go on."""


class Unread(UserError):
    """Why one input can't be read now, which says nothing about what it holds; the others go on."""


class Halt(UserError):
    """What stops the command, as no input is at fault: a full disk of this machine, say."""


def stay_with_parent(number: int) -> None:
    """End this process when its parent is killed; it would wait for work, or for the others, for ever.

    Args:
        number: the parent's process number, as the parent itself knows it: one that is killed while this process
            starts is gone already, and another one adopts it.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        while os.getppid() == number:
            time.sleep(0.05)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limited(seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """(True, result), or (False, reason); the process ends when it takes too long, even inside foreign code."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()
    try:
        return True, function(*arguments)
    except (Refused, UserError) as error:
        return False, str(error)
    except Exception as error:  # a damaged input can raise anything; it is listed, not lost
        return False, f"{type(error).__name__}: {error}"
    finally:
        timer.cancel()


class Pool:
    """Worker processes that survive inputs which crash or hang them.

    Args:
        workers: how many; 0 takes one per core that this process may use.
        seconds: how long one input may take.
    """

    def __init__(self, workers: int = 0, seconds: float = 300.0) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.seconds = seconds
        self._pool = self._new(self.workers)

    def _new(self, workers: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, mp_context=context, initializer=stay_with_parent, initargs=(os.getpid(),))

    def map(
        self, function: Callable[..., Any], items: Iterable[Item], arguments: Callable[[Item], tuple[Any, ...]]
    ) -> Iterator[tuple[Item, bool, Any]]:
        """(item, True, result) or (item, False, reason), in order; a few items are under way at a time.

        Args:
            function: of a module, so that workers can find it.
            arguments: of an item; called here; may raise ``Refused`` or ``UserError``, of which ``Halt`` goes through,
                and ``Unread`` is itself the reason.
        """
        pending: deque[tuple[Item, tuple[Any, ...] | None, Future[Any] | str | Unread]] = deque()
        for item in items:
            try:
                given = arguments(item)
                pending.append((item, given, self._submit(function, given)))
            except Halt:
                raise
            except (Refused, UserError) as error:
                pending.append((item, None, error if isinstance(error, Unread) else str(error)))
            if len(pending) > 2 * self.workers:
                yield self._result(function, *pending.popleft())
        while pending:
            yield self._result(function, *pending.popleft())

    def _submit(self, function: Callable[..., Any], given: tuple[Any, ...]) -> Future[Any]:
        try:
            return self._pool.submit(_limited, self.seconds, function, given)
        except BrokenProcessPool:
            self._pool = self._new(self.workers)
            return self._pool.submit(_limited, self.seconds, function, given)

    def _result(
        self, function: Callable[..., Any], item: Item, given: tuple[Any, ...] | None,
        future: Future[Any] | str | Unread,
    ) -> tuple[Item, bool, Any]:  # fmt: skip
        if isinstance(future, (str, Unread)) or given is None:
            return item, False, future
        try:
            return item, *future.result()
        except BrokenProcessPool:
            # One input took the pool with it: those that were under way are tried alone, and the culprit is found.
            with self._new(1) as alone:
                begin = time.monotonic()
                try:
                    return item, *alone.submit(_limited, self.seconds, function, given).result()
                except BrokenProcessPool:
                    if time.monotonic() - begin < self.seconds:
                        return item, False, "the worker crashed"
                    return item, False, f"the worker took more than {self.seconds:g} s, or crashed"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *details: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
