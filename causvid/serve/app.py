"""The server: one page, one WebSocket per viewer, two downloads; bound to this machine unless it is told otherwise."""

from __future__ import annotations

import asyncio
import hmac
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
import torch

from causvid.data.video import encode_mp4
from causvid.errors import UserError
from causvid.serve.checkpoints import Checkpoint
from causvid.serve.link import Link
from causvid.serve.messages import CACHES, Malformed
from causvid.serve.viewer import Viewer
from causvid.streaming.moment import HOWS, POLICIES

try:
    from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
except ImportError as error:
    raise UserError("causvid serve needs FastAPI and uvicorn: pip install 'causvid[serve]'") from error

PAGE = Path(__file__).parent / "page"
FILES = {"": ("index.html", "text/html"), "app.js": ("app.js", "text/javascript"),
         "chart.js": ("chart.js", "text/javascript"), "style.css": ("style.css", "text/css")}  # fmt: skip
LOCAL = ("localhost", "127.0.0.1", "::1")
MOST_MESSAGE = 8 << 20  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """Who may come, and how many.

    Attributes:
        viewers: pages at once.
        hosts: names under which the server is reached; a page of any other origin is refused.
        token: a secret that the page's address must carry, where there is one.
    """

    viewers: int = 8
    hosts: tuple[str, ...] = LOCAL
    token: str | None = None

    def host(self, host: str) -> bool:
        """Whether a Host header names this server: a name that merely resolves to it does not."""
        parts = _split(f"//{host}")
        return parts is not None and parts.hostname in self.hosts

    def origin(self, origin: str | None, host: str) -> bool:
        """Whether a page of this origin is ours; what is no browser sends none."""
        if origin is None:
            return True
        parts = _split(origin)
        return parts is not None and parts.netloc == host

    def secret(self, given: str | None) -> bool:
        return self.token is None or (given is not None and hmac.compare_digest(given.encode(), self.token.encode()))


def _split(address: str) -> SplitResult | None:
    """The parts of an address; None where it is none, such as one with half a bracket."""
    try:
        return urlsplit(address)
    except ValueError:
        return None


class Hall:
    """The viewers that are there, and the worker that serves them."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], threads: int) -> None:
        self.checkpoints = checkpoints
        self.viewers: dict[str, Viewer] = {}
        self.link = Link(checkpoints, threads, self._heard, self._died)

    def _heard(self, told: tuple) -> None:
        """What the worker says goes to the viewer that it is about, if that one is still there."""
        kind, name, *rest = told
        viewer = self.viewers.get(name)
        if viewer is None:
            return
        if kind == "record":
            if viewer.recorded is not None and not viewer.recorded.done():
                viewer.recorded.set_result(rest[0])
            return
        try:
            {"opened": viewer.opened, "block": viewer.block, "event": viewer.done, "fed": viewer.fed,
             "branch": viewer.branched, "error": viewer.failed}[kind](*rest)  # fmt: skip
        except Malformed as error:
            viewer.failed(str(error), False)

    def _died(self) -> None:
        for viewer in self.viewers.values():
            viewer.worker_died()


def create(checkpoints: Mapping[str, Checkpoint], bounds: Bounds | None = None, threads: int = 0) -> FastAPI:
    """The application.

    Args:
        checkpoints: what can be streamed, by name; the first is the default.
        threads: of the worker; 0 takes those of this process.
    """
    bounds = bounds or Bounds()
    hall = Hall(checkpoints, threads or torch.get_num_threads())

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        hall.link.start()
        yield
        await asyncio.to_thread(hall.link.stop)

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.hall = hall

    def refused(request: Any) -> bool:
        host = request.headers.get("host", "")
        return not (bounds.host(host) and bounds.secret(request.query_params.get("token")))

    @app.get("/")
    @app.get("/{name}")
    async def page(request: Request, name: str = "") -> Response:
        """The page and its parts. They hold no secret, and need none: the sockets do."""
        if not bounds.host(request.headers.get("host", "")):
            return Response("this server is not reached under that name", 421)
        if name not in FILES:
            return Response("nothing is here", 404, HEADERS)
        file, kind = FILES[name]
        return Response((PAGE / file).read_bytes(), headers=HEADERS, media_type=f"{kind}; charset=utf-8")

    @app.get("/viewers/{name}/video.mp4")
    async def video(request: Request, name: str) -> Response:
        """The last frames of a viewer's stream as an mp4."""
        viewer = hall.viewers.get(name)
        if refused(request) or viewer is None or not viewer.frames:
            return Response("no such stream, or it has no frames yet", 404, HEADERS)
        blocks = list(viewer.frames)
        size = blocks[-1].shape[1:]
        frames = np.concatenate([block for block in blocks if block.shape[1:] == size])
        scale = max(1, 256 // min(size[:2]))
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        content = await asyncio.to_thread(encode_mp4, pixels, viewer.fps, scale)
        return _file(content, "video/mp4", "causvid.mp4")

    @app.get("/viewers/{name}/session")
    async def session(request: Request, name: str) -> Response:
        """A viewer's session file."""
        viewer = hall.viewers.get(name)
        if refused(request) or viewer is None or viewer.recorded is not None:
            return Response("no such stream, or it is being recorded already", 404, HEADERS)
        viewer.recorded = asyncio.get_running_loop().create_future()
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "causvid.session"
                hall.link.say("record", name, path)
                problem = await asyncio.wait_for(viewer.recorded, 60)
                if problem is not None:
                    return Response(problem, 409, HEADERS)
                return _file(path.read_bytes(), "application/octet-stream", path.name)
        except TimeoutError:
            return Response("the worker is busy; try again", 503, HEADERS)
        finally:
            viewer.recorded = None

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        """One viewer, from when the page opens until it closes."""
        host = socket.headers.get("host", "")
        if refused(socket) or not bounds.origin(socket.headers.get("origin"), host):
            await socket.close(1008)
            return
        await socket.accept()
        if len(hall.viewers) >= bounds.viewers:
            await socket.send_json({"type": "error", "message": f"{bounds.viewers} viewers are here already; come "
                                    "again later", "fatal": True})  # fmt: skip
            await socket.close(1013)
            return
        viewer = Viewer(hall.link.say, checkpoints)
        hall.viewers[viewer.name] = viewer
        viewer.send({
            "type": "hello", "viewer": viewer.name, "checkpoints": list(checkpoints), "caches": CACHES,
            "policies": POLICIES, "hows": HOWS, "prompts": {name: c.prompt for name, c in checkpoints.items()},
        })  # fmt: skip
        sending = asyncio.create_task(_send(socket, viewer))
        try:
            while (content := await socket.receive())["type"] == "websocket.receive":
                text, raw = content.get("text"), content.get("bytes")
                await viewer.heard(text if text is not None else raw or b"")
        except (WebSocketDisconnect, RuntimeError):
            pass  # the page is gone
        finally:
            sending.cancel()
            del hall.viewers[viewer.name]
            hall.link.say("close", viewer.name)

    return app


async def _send(socket: WebSocket, viewer: Viewer) -> None:
    """Send what waits, as fast as the page takes it."""
    with suppress(WebSocketDisconnect, RuntimeError):
        while True:
            content = await viewer.outbox.get()
            if isinstance(content, bytes):
                await socket.send_bytes(content)
            else:
                await socket.send_text(content)


def _file(content: bytes, kind: str, name: str) -> Response:
    return Response(
        content, media_type=kind, headers={**HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}
    )
