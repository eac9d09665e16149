"""The server over real sockets: streams, bounds, what is malformed, who is slow, and a worker that dies."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import struct
import urllib.error
import urllib.request
import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from stream_toys import BLUE, RED, Toy, toy_engine

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from stream_server import Page, memory, server, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from causvid.data.clips import png
from causvid.errors import UserError
from causvid.serve.messages import Malformed, Rate, parse
from causvid.serve.viewer import Viewer
from causvid.serve.worker import Worker
from causvid.streaming import record as records
from causvid.streaming.session import Session
from causvid.streaming.sources import read_image

TOYS = {"toy": Toy("toy"), "another": Toy("another", prompt=BLUE)}


@pytest.fixture(scope="module")
def served():
    with server(TOYS, viewers=4) as found:
        yield found


@pytest.fixture
def page(served):
    with Page(served[0]) as opened:
        yield opened
    until(lambda: not served[1].viewers)


def fetch(address, path, **headers):
    request = urllib.request.Request(f"http://{address}/{path}", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=240) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def rgb(made):
    """A session's block as it is sent."""
    return made.frames[0].permute(0, 2, 3, 1).contiguous().numpy().tobytes()


def picture(size=8):
    return png(torch.randint(256, (size, size, 3), dtype=torch.uint8).numpy())


def test_a_page_sees_what_a_session_makes(page):
    """Frames, prompts, branches and the record are those of the same session without a server."""
    engine = toy_engine()
    session = Session(engine, RED, 4, "window", 2)
    assert page.hello["checkpoints"] == ["toy", "another"]
    begun = page.start(seed=4, cache="window", steps=2)
    assert (begun["height"], begun["width"], begun["wanted"], begun["steps"]) == (4, 4, 5, 2)
    for number in range(3):
        block = page.block()
        assert block["block"] == number and block["rgb"] == rgb(session.step())
    page.say("prompt", text=BLUE, policy="recache")
    seen = []
    while not any(m["type"] == "event" for m in seen):
        seen.append(page.next())
        if seen[-1]["type"] == "block":
            page.say("ack", number=seen[-1]["number"])
    for block in (m for m in seen if m["type"] == "block"):
        assert block["rgb"] == rgb(session.step())
    assert seen[-1]["block"] == session.block
    session.prompt(BLUE, "recache")
    assert page.block()["rgb"] == rgb(session.step())
    page.say("fork", block=1, seed=9)
    branch = page.get("branch")
    page.say("ack", number=page.seen)
    fork = session.fork(1, 9)
    assert branch["block"] == 1 and branch["branches"] == [0, 1]
    assert page.block()["rgb"] == rgb(fork.step())


def test_the_record_replays_and_the_download_plays(page, served, tmp_path):
    page.start(seed=2)
    page.block()
    page.say("prompt", text=BLUE)
    page.block()
    page.block()
    page.say("pause", on=True)
    status, _, content = fetch(served[0], f"viewers/{page.hello['viewer']}/session")
    assert status == 200
    (tmp_path / "s").write_bytes(content)
    record = records.read(tmp_path / "s")
    assert [event.kind for event in record.events] == ["prompt"] and len(
        list(records.replay(toy_engine(), record))
    ) >= 3
    status, headers, content = fetch(served[0], f"viewers/{page.hello['viewer']}/video.mp4")
    import av

    with av.open(io.BytesIO(content)) as video:
        frames = sum(1 for _ in video.decode(video=0))
    assert status == 200 and frames >= 5 + 6 + 6 and "attachment" in headers["Content-Disposition"]
    assert fetch(served[0], "viewers/nobody/video.mp4")[0] == fetch(served[0], "viewers/nobody/session")[0] == 404


def test_a_picture_begins_a_stream_and_a_feed_is_waited_for(page):
    page.start(how="first")
    page.block()
    content = picture()
    page.socket.send(b"\x01" + content)
    page.get("started")
    image = read_image(content, 4, 4)
    block = page.block()
    assert block["block"] == 0 and block["rgb"][:48] == image.permute(1, 2, 0).contiguous().numpy().tobytes()
    page.start()
    page.say("pause", on=True)
    page.say("video", on=True, strength=0.9)
    page.say("pause", on=False)
    made = 0
    while True:  # blocks that were made before the feed was on
        try:
            made = page.next(timeout=1.0).get("number", made)
        except TimeoutError:
            break
    page.say("ack", number=made)
    with pytest.raises(TimeoutError):
        page.next(timeout=0.5)
    page.socket.send(b"\x02" + bytes(48 * 6))
    assert page.get("block")["number"] == made + 1


def test_a_feed_that_is_too_fast_is_bounded_and_nobody_waits_for_it(served):
    """What waits is that of a few blocks, in the worker and before it; the rest is left out, and told."""
    with Page(served[0]) as fast, Page(served[0]) as other:
        fast.start()
        other.start()
        fast.say("pause", on=True)
        fast.say("video", on=True)
        for _ in range(30):
            fast.socket.send(b"\x02" + bytes(48 * 8))
        until(lambda: "at most 64 wait" in fast.next().get("message", ""))
        other.block()
        fast.drain()
        fast.say("pause", on=False)
        number, taken = fast.seen, []
        while True:  # what was taken is restyled, and not more
            fast.say("ack", number=fast.seen)
            try:
                taken.append(fast.get("block", timeout=1.0))
            except TimeoutError:
                break
        assert taken and taken[-1]["number"] > number and sum(len(b["rgb"]) // 48 for b in taken) <= 64 + 3 * 6
        assert taken[-1]["waiting"] < taken[-1]["wanted"]
        fast.socket.send(b"\x02" + bytes(48 * 8))
        assert fast.get("block")["number"] == taken[-1]["number"] + 1  # there is room again


def test_a_page_that_does_not_look_stops_its_own_stream_alone(served):
    with Page(served[0]) as idle, Page(served[0]) as busy:
        idle.start()
        busy.start()
        for _ in range(12):
            last = busy.block()
        assert last["number"] == 12
        seat = [idle.get("block")["number"] for _ in range(3)]
        assert seat == [1, 2, 3]
        with pytest.raises(TimeoutError):
            idle.get("block", timeout=0.5)
        with pytest.raises(AssertionError, match="3 blocks were sent"):
            idle.say("ack", number=9)
            idle.get("block")


class Said(list):
    """A pipe that keeps what a worker says."""

    send = list.append


@pytest.mark.parametrize(("asked", "policy"), [({}, None), ({"cache": "own"}, None), ({"cache": "full"}, "full")])
def test_a_page_streams_as_the_checkpoints_spec_says_unless_it_asks_otherwise(asked, policy):
    said: list[tuple] = []
    viewer = Viewer(lambda *told: bool(said.append(told) or True), TOYS)
    asyncio.run(viewer.heard(json.dumps({"type": "start", "prompt": RED, **asked})))
    options = next(part for part in said[-1] if isinstance(part, dict))
    assert options["cache"] == policy
    engine = replace(toy_engine(), cache={"name": "sink_window"})  # its mask has no sink
    rule = Session(engine, RED, cache=options["cache"]).moment.cache.rule
    assert rule.sees(30, 0) and rule.sees(30, 20) == (policy == "full")


def test_going_back_far_makes_nobody_wait():
    said: Any = Said()
    worker = Worker(said, TOYS)
    options = {"checkpoint": "toy", "prompt": RED, "seed": 0, "cache": "trained", "steps": 1}
    worker.on_open("me", options, block=80)
    for block, blocks in ((71, 80), (65, 80)):
        with pytest.raises(UserError, match=f"block {block} would make .* up to 64, and from {blocks - 8} on"):
            worker.on_fork("me", block, None)
    with pytest.raises(UserError, match="blocks 0 to 80"):
        worker.on_fork("me", 81, None)
    for block in (72, 64):
        worker.seats["me"].active = 0
        worker.on_fork("me", block, 3)
        assert said[-1][2]["block"] == block


def test_there_are_no_more_viewers_than_allowed(served):
    pages = [Page(served[0]) for _ in range(4)]
    with pytest.raises(AssertionError, match="4 viewers are here already"):
        Page(served[0])
    pages.pop().close()
    until(lambda: len(served[1].viewers) == 3)
    with Page(served[0]) as late:
        late.start()
        late.block()
    for page in pages:
        page.close()
    until(lambda: not served[1].viewers)


def test_what_comes_from_elsewhere_is_refused(served):
    address = served[0]
    with Page(address, origin=f"http://{address}"):
        pass
    for origin in ("http://evil.example", "null", f"http://{address}.evil.example", "http://127.0.0.1:1", "http://["):
        with pytest.raises((InvalidStatus, ConnectionClosed)):
            Page(address, origin=origin)
    assert fetch(address, "")[0] == 200
    assert fetch(address, "", Host="evil.example")[0] == 421  # a name that only resolves to here
    assert fetch(address, "viewers/x/video.mp4", Host="evil.example")[0] == 404
    assert fetch(address, "", Host="[")[0] == 421  # no address at all
    for path in ("../app.py", "%2e%2e/app.py", "app.py", "viewers/../../x"):
        assert fetch(address, path)[0] in (404, 421)
    policy = fetch(address, "")[1]["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy


def test_a_token_is_asked_for():
    with server(TOYS, token="secret") as (address, _):
        with Page(address, token="secret") as page:
            page.start()
            viewer = page.hello["viewer"]
            page.block()
            assert fetch(address, f"viewers/{viewer}/video.mp4")[0] == 404
            assert fetch(address, f"viewers/{viewer}/video.mp4?token=secret")[0] == 200
        for wrong in (None, "secre", "secret2"):
            with pytest.raises((InvalidStatus, ConnectionClosed)):
                Page(address, token=wrong)


def test_a_worker_that_dies_is_reported_and_another_goes_on_where_it_was(served):
    address, hall = served
    with Page(address) as page, Page(address) as other:
        page.start(seed=1)
        other.start(seed=2)
        session = Session(toy_engine(), RED, 1)
        for _ in range(4):
            assert page.block()["rgb"] == rgb(session.step())
        before = hall.link.restarts
        os.kill(hall.link.process.pid, signal.SIGKILL)
        seen = []
        while not any(m["type"] == "started" for m in seen):
            seen.append(page.next())
        assert any("another one goes on" in m.get("message", "") for m in seen) and hall.link.restarts == before + 1
        for _ in (m for m in seen if m["type"] == "block"):
            session.step()
        page.say("ack", number=seen[-1]["block"])
        block = page.block()
        assert block["block"] == session.block and block["rgb"] == rgb(session.step())
        other.get("started")
        other.block()


def killed(page, hall):
    """What the page hears until another worker has its stream."""
    os.kill(hall.link.process.pid, signal.SIGKILL)
    seen = []
    while not any(m["type"] == "started" for m in seen):
        seen.append(page.next())
    return seen


@pytest.mark.parametrize("back", [True, False])
def test_after_a_death_a_branch_has_its_own_events_and_no_others(served, page, back):
    page.start(seed=1)
    for _ in range(3):
        page.block()
    page.say("pause", on=True)
    page.say("fork", seed=9)
    block = page.get("branch")["block"]
    page.say("prompt", text=BLUE)
    page.get("event")
    if back:
        page.say("branch", branch=0)
        page.get("branch")
    seen = killed(page, served[1])
    told = next(m["message"] for m in seen if m["type"] == "worker")
    assert "where this stream was; the other branches are lost" in told
    session = Session(toy_engine(), RED, 1)
    for _ in range(block):
        session.step()
    if not back:
        session.reseed(9)
        session.prompt(BLUE)
    page.say("pause", on=False)
    page.say("ack", number=seen[-1]["block"])
    made = page.block()
    assert made["block"] == block == session.block and made["rgb"] == rgb(session.step())
    assert made["prompt"] == (RED if back else BLUE)


def test_after_a_death_a_restyled_stream_begins_anew_and_says_so(served, page):
    page.start(seed=1)
    page.block()
    page.say("prompt", text=BLUE)
    page.get("event")
    page.say("video", on=True)
    page.socket.send(b"\x02" + bytes(48 * 6))
    until(lambda: served[1].viewers[page.hello["viewer"]]._events is None)
    page.say("video", on=False)
    seen = killed(page, served[1])
    assert any("with a new stream of the last prompt" in m.get("message", "") for m in seen)
    session = Session(toy_engine(), BLUE, 1)
    assert page.block()["rgb"] == rgb(session.step())


def test_closing_the_page_ends_its_streams(served):
    address, hall = served
    with Page(address) as page:
        page.start()
        page.block()
    until(lambda: not hall.viewers)
    with Page(address) as page:
        page.start(checkpoint="another")
        assert page.block()["branch"] == 0


BAD = [
    ("", "must be JSON"), ("[", "must be JSON"), ("[" * 9000, "must be JSON"), ("[]", "with a 'type'"),
    ('{"type": 1}', "with a 'type'"), ('{"type": "strat"}', "did you mean 'start'"),
    ('{"type": "start"}', "'prompt' is missing"), ('{"type": "start", "prompt": ""}', "expected text"),
    ('{"type": "start", "prompt": "\\ud800"}', "no Unicode text"), ('{"type": "start", "prompt": 3}', "expected text"),
    ('{"type": "start", "prompt": "a", "los": 1}', "unknown field 'los'"),
    ('{"type": "start", "prompt": "a", "steps": 65}', "from 1 to 64"),
    ('{"type": "start", "prompt": "a", "steps": true}', "from 1 to 64"),
    ('{"type": "start", "prompt": "a", "seed": 1e400}', "from 0 to"),
    ('{"type": "start", "prompt": "a", "cache": ["full"]}', "accepted: own, trained"),
    ('{"type": "prompt", "text": "a", "policy": "x"}', "accepted: keep"),
    ('{"type": "video", "on": true, "strength": NaN}', "above 0"), ('{"type": "video", "on": 1}', "true or false"),
    (json.dumps({"type": "prompt", "text": "a" * 2001}), "expected text"), ("x" * 20000, "at most 16384"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_messages_are_checked_field_by_field(text, message):
    with pytest.raises(Malformed, match=message):
        parse(text)


def test_a_bucket_of_messages_empties_and_fills(monkeypatch):
    now = [1.0]
    monkeypatch.setattr("causvid.serve.messages.time.monotonic", lambda: now[0])
    rate = Rate(per_second=2, burst=3)
    assert [rate.take() for _ in range(4)] == [True, True, True, False]
    now[0] += 1
    assert [rate.take() for _ in range(3)] == [True, True, False]


def bomb(side):
    """A PNG of a few kilobytes that says it holds ``side`` squared pixels, and does."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, rows = zlib.compressobj(9), []
    for _ in range(min(side, 3000)):
        rows.append(packer.compress(bytes(side // 8 + 1)))
    body = b"".join(rows) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, b"\x89PNG\r\n\x1a\n", picture()[:-30], bomb(30_000), b"GIF89a" * 9]
)
def test_a_bad_picture_is_refused(content):
    with pytest.raises(UserError, match="picture"):
        read_image(content, 4, 4)


def malformed(count):
    """Messages of every wrong kind, the same ones every time."""
    draw = random.Random(0)
    for number in range(count):
        kind = number % 8
        if kind == 0:
            yield draw.choice(BAD)[0]
        elif kind == 1:
            yield draw.randbytes(draw.choice([1, 50, 5000]))
        elif kind == 2:
            yield b"\x01" + draw.choice([draw.randbytes(300), picture()[: draw.randrange(80)], bomb(30_000)])
        elif kind == 3:
            yield b"\x02" + bytes(draw.choice([0, 47, 48 * 65, 48 * 7]))
        elif kind == 4:
            field = draw.choice(["prompt", "text", "block", "number", "on", "strength", "x"])
            value = draw.choice([None, -1, 1e99, [], {}, "\x00", "x" * 3000, True])
            yield json.dumps({"type": draw.choice(["start", "prompt", "ack", "fork", "video", "branch"]), field: value})
        elif kind == 5:
            yield json.dumps({"type": "prompt", "text": draw.choice(["purple", "a " * 30, "'; drop", "\u202e"])})
        elif kind == 6:
            yield json.dumps({"type": "fork", "block": draw.choice([10**6, 2**31])})
        else:
            yield "".join(chr(draw.randrange(32, 300)) for _ in range(40))


def abuse(address, hall, count):
    """Streams go on beside a page that sends nothing but nonsense, and that page's own does too."""
    with Page(address) as good, Page(address) as bad:
        for page in (good, bad):
            page.start()
            page.block()
        worker, restarts = hall.link.process.pid, hall.link.restarts
        for number, message in enumerate(malformed(count)):
            bad.socket.send(message)
            bad.drain()
            if number % 50 == 0:
                good.block()
        for _ in range(3):
            good.block()
        bad.start_when_there_is_room(RED)
        until(lambda: bad.next()["type"] == "block")
        assert hall.link.process.pid == worker and hall.link.restarts == restarts


def test_a_few_malformed_messages_leave_every_stream_alive(served):
    abuse(*served, count=160)


@pytest.mark.slow
def test_two_thousand_malformed_messages_leave_every_stream_alive(served):
    abuse(*served, count=2000)


def test_a_message_that_is_too_large_ends_its_own_connection_alone(served):
    with Page(served[0]) as good:
        good.start()
        with Page(served[0]) as bad, pytest.raises(ConnectionClosed):
            bad.socket.send(bytes(9 << 20))
            bad.get("never")
        good.block()


@pytest.mark.slow
def test_viewers_that_come_and_go_leave_no_memory_behind(served):
    address, hall = served

    def visit():
        with Page(address) as page:
            page.start(cache="full")
            for _ in range(40):
                page.block()
        until(lambda: not hall.viewers)

    for _ in range(3):
        visit()
    before = memory(hall)
    for _ in range(8):
        visit()
    assert memory(hall) < 1.05 * before
