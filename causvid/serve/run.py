"""Runs the server on a socket until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch

from causvid import progress
from causvid.errors import UserError
from causvid.serve.app import MOST_MESSAGE, Bounds, create
from causvid.serve.checkpoints import Checkpoint

try:
    import uvicorn
except ImportError as error:
    raise UserError("causvid serve needs FastAPI and uvicorn: pip install 'causvid[serve]'") from error


def listen(
    checkpoints: Mapping[str, Checkpoint],
    host: str,
    port: int,
    viewers: int,
    names: tuple[str, ...],
    token: str | None,
    threads: int,
) -> None:
    """Serve until the process is stopped; prints the page's address first.

    Raises:
        UserError: the address can't be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise UserError(
            f"{host} port {port} can't be bound: {error.strerror or error}; choose another --port"
        ) from error
    app = create(checkpoints, Bounds(viewers, names, token), threads or torch.get_num_threads())
    config = uvicorn.Config(
        app, log_level="warning", ws_max_size=MOST_MESSAGE, ws_max_queue=16, ws_ping_interval=20, ws_ping_timeout=20,
        timeout_graceful_shutdown=2, server_header=False,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    secret = f"?token={token}" if token else ""
    progress.say(f"streams: {', '.join(checkpoints)}")
    print(f"http://{shown}:{bound.getsockname()[1]}/{secret}", flush=True)
    uvicorn.Server(config).run(sockets=[bound])
