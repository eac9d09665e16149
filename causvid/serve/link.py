"""The server's end of the pipe: it starts the worker, passes on what is said, and starts another when one dies."""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from causvid.serve import worker
from causvid.serve.checkpoints import Checkpoint

WAITING = 4096  # messages to a worker that does not take them


class Link:
    """A worker, and another one after it. All callbacks run in the event loop.

    Args:
        checkpoints: what it can load.
        threads: of the worker.
        heard: called with every tuple that the worker says.
        died: called when a worker is gone and the next one has started.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        threads: int,
        heard: Callable[[tuple], None],
        died: Callable[[], None],
    ) -> None:
        self._checkpoints, self._threads, self._heard, self._died = dict(checkpoints), threads, heard, died
        self._context = multiprocessing.get_context("spawn")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: queue.Queue[Any] = queue.Queue(WAITING)
        self._ended = False
        self.restarts = 0
        self.process: Any = None

    def start(self) -> None:
        """Start the worker and the threads that talk with it; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._spawn()

    def _spawn(self) -> None:
        here, there = self._context.Pipe()
        self.process = self._context.Process(
            target=worker.main, args=(there, self._checkpoints, self._threads), daemon=True, name="causvid-worker"
        )
        self.process.start()
        there.close()
        self._outbox = queue.Queue(WAITING)
        threading.Thread(target=self._listen, args=(here, self._outbox), daemon=True).start()
        threading.Thread(target=self._talk, args=(here, self._outbox), daemon=True).start()

    def _listen(self, pipe: Any, outbox: queue.Queue) -> None:
        try:
            while True:
                self._call(self._heard, pipe.recv())
        except (EOFError, OSError):
            pipe.close()
            self._call(self._lost)
            outbox.put(None)

    def _call(self, function: Callable, *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    @staticmethod
    def _talk(pipe: Any, outbox: queue.Queue) -> None:
        while (told := outbox.get()) is not None:
            try:
                pipe.send(told)
            except (OSError, ValueError):
                return  # the listener finds out too

    def _lost(self) -> None:
        if self._ended:
            return
        self.process.join(0)
        self.restarts += 1
        self._spawn()
        self._died()

    def say(self, *told: Any) -> bool:
        """Tell the worker something; False where it has not taken thousands of messages already."""
        try:
            self._outbox.put_nowait(told)
        except queue.Full:
            return False
        return True

    def stop(self) -> None:
        """End the worker."""
        self._ended = True
        self._outbox.put(None)
        self.process.terminate()
        self.process.join(5)
