"""A real server on a free port for tests, and a page's side of the socket."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from contextlib import contextmanager

import psutil
import uvicorn
from websockets.sync.client import connect

from causvid.serve.app import MOST_MESSAGE, Bounds, create


class Page:
    """What a page does with its socket, without a browser."""

    def __init__(self, address, token=None, origin=None):
        secret = f"?token={token}" if token else ""
        self._opening = connect(f"ws://{address}/stream{secret}", max_size=None, origin=origin, proxy=None)
        self.socket = self._opening.__enter__()
        self.seen = 0
        self.hello = self.get("hello")

    def say(self, kind, **told):
        self.socket.send(json.dumps({"type": kind, **told}))

    def next(self, timeout=240):
        """The next message: its facts, and the frames of a block."""
        message = self.socket.recv(timeout=timeout)
        if isinstance(message, str):
            return json.loads(message)
        (length,) = struct.unpack_from("<I", message)
        block = {**json.loads(message[4 : 4 + length]), "rgb": message[4 + length :]}
        self.seen = block["number"]
        return block

    def get(self, kind, timeout=240):
        """The next message of a kind; what comes before it is passed over, an error is not."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self.next(timeout)
            if message["type"] == kind:
                return message
            assert message["type"] != "error", message
        raise TimeoutError(kind)

    def start(self, prompt="a red circle moves left", **told):
        self.say("start", prompt=prompt, **told)
        return self.get("started")

    def start_when_there_is_room(self, prompt):
        """Start although the page has said too much: what comes too fast is left out, so it is said again."""
        for _ in range(60):
            self.say("start", prompt=prompt)
            try:
                while self.next(timeout=1)["type"] != "started":
                    pass
                return
            except TimeoutError:
                continue
        raise TimeoutError("started")

    def block(self):
        """The next block, shown."""
        block = self.get("block")
        self.say("ack", number=block["number"])
        return block

    def drain(self):
        """Read what is there; a client that never reads loses its connection to the keepalive."""
        try:
            while True:
                self.next(timeout=0)
        except TimeoutError:
            return

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextmanager
def server(checkpoints, **bounds):
    """(address, the application's hall) of a server that runs in a thread."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    app = create(checkpoints, Bounds(**bounds), threads=1)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", ws_max_size=MOST_MESSAGE))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.02)
        yield f"127.0.0.1:{bound.getsockname()[1]}", app.state.hall
    finally:
        running.should_exit = True
        thread.join(20)
        bound.close()


def memory(hall):
    """Bytes that the worker's process holds."""
    return psutil.Process(hall.link.process.pid).memory_info().rss


def until(condition, timeout=240):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
