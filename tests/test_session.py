"""Sessions, exact where exactness is defined: replays, forks, streaming decode, prompts, pictures, videos."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from stream_toys import BLUE, CODECS, RED, pixels, toy_engine, wan_engine

from causvid import weights
from causvid.attention.masks import BlockCausal, SinkWindow, SlidingWindow
from causvid.attention.policies import SinkAndWindow
from causvid.attention.positions import WindowRelative
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.samplers.rollout import Rollout
from causvid.streaming import record as records
from causvid.streaming.moment import entered
from causvid.streaming.script import Play, Script
from causvid.streaming.session import Session
from causvid.types import VaeState


def latents(session, blocks):
    return torch.cat([session.step().latents for _ in range(blocks)], 1)


def steer(session):
    """Six blocks in which everything happens that may happen in mid-stream."""
    made = [session.step(), session.step()]
    session.prompt(BLUE, "recache")
    made.append(session.step())
    session.video(pixels(session.engine, 2 * session.wanted, session.moment.batch), 0.8)
    made += [session.step(), session.step()]
    session.prompt(RED)
    session.reseed(5)
    return [*made, session.step()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def same(left, right):
    return all(
        torch.equal(a.latents, b.latents) and torch.equal(a.frames, b.frames) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("context_t", [0.0, 0.3])
def test_a_session_is_the_rollout(context_t):
    """Block by block, with the same noise; and the context of the last block is not computed."""
    engine = toy_engine(context_t=context_t)
    session = Session(engine, [RED, BLUE], seed=3)
    made = latents(session, 5)
    rollout = Rollout(engine.times, context_t)
    draw = Draw(3, "generate", 0, [0, 1])
    wanted = [b.latents for b in rollout.stream(engine.model, (15, *engine.frame_shape), session.moment.text, draw)]
    assert torch.equal(made, torch.cat(wanted, 1))
    assert session.moment.pending is not None and session.moment.cache.next_block == 4


@pytest.mark.parametrize("codec", CODECS)
def test_streaming_decode_and_encode_equal_the_whole_clip(codec):
    if codec == "wan_vae":
        pytest.importorskip("diffusers")
    engine = CODECS[codec]()
    session = Session(engine, RED)
    made = [session.step() for _ in range(3)]
    whole = engine.codec.decode(torch.cat([block.latents for block in made], 1))
    frames = torch.cat([block.frames for block in made], 1)
    assert torch.equal(frames, ((whole.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    clip, state, parts, start = whole.clamp(-1, 1), VaeState(), [], 0
    for count in (block.frames.shape[1] for block in made):
        out = engine.codec.encode_block(clip[:, start : start + count], state)
        state, start = out.state, start + count
        parts.append(out.value)
    assert torch.allclose(torch.cat(parts, 1), engine.codec.encode(clip), atol=1e-5)


@pytest.mark.parametrize("make", [toy_engine, wan_engine], ids=["tiny", "wan"])
def test_a_replay_gives_the_same_bytes(make, tmp_path):
    if make is wan_engine:
        pytest.importorskip("diffusers")
    engine = make()
    session = Session(engine, RED, seed=1, cache={"name": "sink_window", "window_frames": 3}, steps=2)
    session.image(pixels(engine, 1)[0, 0], "first")
    made = steer(session)
    records.write(tmp_path / "s.session", records.record(session))
    found = records.read(tmp_path / "s.session")
    again = list(records.replay(engine, found))
    assert same(made, again) and found.digest == session.digest and found.blocks == 6
    assert [event.kind for event in found.events] == ["image", "prompt", "video", "prompt", "seed"]


@pytest.mark.parametrize("keep", [0, 2, 9])
def test_a_fork_is_a_fresh_run_with_the_same_history(keep):
    """From any block, whatever is still held of it; going back forgets what was done since."""
    engine = toy_engine()
    session = Session(engine, RED, keep=keep)
    steer(session)
    for block in range(7):
        fork, fresh = session.fork(block), Session(engine, RED)
        for number in range(block):
            for event in (e for e in session.recorded if e.block == number):
                fresh.apply(event)
            fresh.step()
        assert fork.digest == fresh.digest and fork.marks == fresh.marks and fork.block == block
        fork.prompt(BLUE)
        fresh.prompt(BLUE)
        assert same([fork.step(), fork.step()], [fresh.step(), fresh.step()])
    now = session.fork()
    assert same([now.step()], [session.step()])
    session.seek(3)
    fresh = Session(engine, RED)
    steer(fresh)
    assert session.block == 3 and same([session.step()], [fresh.fork(3).step()])
    assert [event.block for event in session.recorded] == [2]


def test_a_fork_with_another_seed_differs_from_there_on():
    session = Session(toy_engine(), RED)
    latents(session, 2)
    fork = session.fork(1, seed=9)
    assert not torch.equal(fork.step().latents, session.fork(1).step().latents)


def test_two_forks_with_two_prompts_do_not_disturb_each_other():
    session = Session(toy_engine(), RED)
    latents(session, 2)
    alone = session.fork()
    alone.prompt(BLUE)
    wanted = latents(alone, 3)
    one, two = session.fork(), session.fork()
    one.prompt(BLUE)
    mixed = []
    for _ in range(3):
        mixed.append(one.step().latents)
        two.step()
    assert torch.equal(torch.cat(mixed, 1), wanted)


@pytest.mark.parametrize("rule", [BlockCausal(3), BlockCausal(2, 1)])
def test_recaching_is_the_context_of_the_new_text(rule):
    """With everything kept: as if the same latents had been committed with the new text from the start."""
    engine = toy_engine(rule)
    session = Session(engine, RED)
    clean = latents(session, 4)
    session.prompt(BLUE, "recache")
    session.step()
    text, cache = engine.encode_text([BLUE]), engine.model.new_cache()
    with torch.no_grad():
        for start, stop in rule.blocks(clean.shape[1]):
            t = torch.zeros(1, stop - start)
            cache = engine.model(clean[:, start:stop], t, text, cache=cache, commit=True).cache
    for (frames, layers), (wanted, others) in zip(session.moment.cache.blocks, cache.blocks, strict=True):
        assert frames == wanted
        assert all(equal(kv, other) for kv, other in zip(layers, others, strict=True))


def test_keeping_leaves_the_context_and_changes_what_follows():
    engine = toy_engine()
    kept, recached, other = (Session(engine, RED) for _ in range(3))
    for session in (kept, recached, other):
        latents(session, 3)
    kept.prompt(BLUE, "keep")
    recached.prompt(BLUE, "recache")
    a, b, c = (session.step().latents for session in (kept, recached, other))
    assert not torch.equal(a, c) and not torch.equal(a, b)
    assert torch.equal(kept.moment.cache.blocks[-1][1][0][0], other.moment.cache.blocks[-1][1][0][0])
    assert not torch.equal(kept.moment.cache.blocks[-1][1][1][0], recached.moment.cache.blocks[-1][1][1][0])


@torch.no_grad()
def test_cutting_forgets_the_context():
    """The next block is what the network makes of the new text behind nothing, at its own place in the stream."""
    engine = toy_engine()
    session, kept = Session(engine, RED), Session(engine, RED)
    for stream in (session, kept):
        latents(stream, 2)
    session.prompt(BLUE, "cut")
    kept.prompt(BLUE, "keep")
    made = session.step().latents
    empty = engine.model.new_cache().at(2)
    assert not session.moment.cache.frames and not torch.equal(made, kept.step().latents)
    draw = Draw(0, "generate", 0, [0])
    text, x0 = engine.encode_text([BLUE]), torch.zeros_like(made)
    for index, t in enumerate(engine.times):
        x_t = (1 - t) * x0 + t * draw.normal(f"block2/step{index}", *made.shape[1:])
        x0 = engine.model(x_t, torch.full((1, 3), t), text, cache=empty).x0
    assert torch.allclose(made, x0, atol=1e-5)


@pytest.mark.parametrize(("picture", "first"), [(False, 6), (True, 4)])
def test_after_a_cut_the_sink_is_the_block_that_follows(picture, first):
    """Also where the first block of all is a picture, shorter than the others; and again after a second cut."""
    session = Session(toy_engine(), RED, cache={"name": "sink_window", "window_frames": 6, "sink_frames": 3})
    if picture:
        session.image(torch.zeros(3, *session.engine.pixel_size, dtype=torch.uint8), "alone")
    latents(session, 2)
    for begins in (first, first + 12):
        session.prompt(BLUE, "cut")
        for kept in ([], [0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8]):  # of all blocks but the last
            session.step()
            assert [frame - begins for frame in session.moment.cache.frames] == kept


def test_the_digest_is_over_latents_and_frames():
    session, state = Session(toy_engine(), RED), b""
    for _ in range(2):
        made = session.step()
        state = hashlib.sha256(state + made.latents.numpy().tobytes() + made.frames.numpy().tobytes()).digest()
    assert session.digest == state.hex()


@pytest.mark.parametrize("cache", [{"name": "sink_window", "window_frames": 4, "sink_frames": 2}, "window", "full"])
def test_recaching_keeps_the_frames_that_a_policy_keeps(cache):
    session = Session(toy_engine(SlidingWindow(3, 1, 6)), RED, cache=cache)
    latents(session, 6)
    held = session.fork()
    held.step()
    session.prompt(BLUE, "recache")
    session.step()
    assert session.moment.cache.frames == held.moment.cache.frames
    assert session.moment.cache.bytes == held.moment.cache.bytes


@pytest.mark.parametrize("how", ["still", "first", "alone"])
def test_a_picture_is_what_the_stream_begins_with(how):
    engine = toy_engine()
    session = Session(engine, [RED, BLUE])
    picture = pixels(engine, 1, 2)[:, 0]
    session.image(picture, how)
    first = session.step()
    assert first.frames.shape[1] == {"still": 5, "first": 5, "alone": 1}[how]
    assert torch.equal(first.frames[:, 0], picture)  # this codec loses nothing
    if how == "still":
        assert all(torch.equal(frame, picture) for frame in first.frames.unbind(1))
    assert session.step().frames.shape[1] == 6
    with pytest.raises(UserError, match="a picture starts a stream"):
        session.image(picture, how)


def test_frames_are_restyled_from_the_time_of_the_strength():
    """With little noise what comes out is what the network says of the input; with all of it the input is nothing."""
    engine = toy_engine()
    frames = pixels(engine, 11)
    free = latents(Session(engine, RED), 2)
    session = Session(engine, RED)
    session.video(frames, 1.0)
    assert torch.equal(latents(session, 2), free)
    session = Session(engine, RED)
    session.video(frames[0], 0.7)
    assert session.waiting == 11 and session.wanted == 5
    made = session.step()
    encoded = engine.codec.encode(frames[:, :5].float() / 127.5 - 1)
    noise = Draw(0, "generate", 0, [0]).normal("block0/step0", *encoded.shape[1:])
    with torch.no_grad():
        x_t, t = 0.3 * encoded + 0.7 * noise, torch.full((1, 3), 0.7)
        wanted = engine.model(x_t, t, session.moment.text, cache=engine.model.new_cache()).x0
    assert torch.allclose(made.latents, wanted, atol=1e-6)
    session.step()
    assert session.waiting == 0 and torch.equal(session.step().latents[:, :0], free[:, :0])
    assert session.moment.incoming == ()  # used up: the stream went on from its text
    assert entered((1.0, 0.9, 0.7), 0.8) == (0.8, 0.7) and entered((1.0, 0.9, 0.7), 0.1) == (0.1,)


def test_a_feed_may_come_in_pieces_and_begin_in_mid_stream():
    engine = toy_engine()
    frames = pixels(engine, 18)
    whole, pieces = Session(engine, RED), Session(engine, RED)
    for session in (whole, pieces):
        session.step()
    whole.video(frames, 0.8)
    wanted = latents(whole, 3)
    made = []
    for start in range(0, 18, 6):
        pieces.video(frames[:, start : start + 6], 0.8)
        made.append(pieces.step().latents)
    assert torch.equal(torch.cat(made, 1), wanted)


def test_a_batch_is_its_rows():
    engine = toy_engine()
    both = Session(engine, [RED, BLUE])
    together = latents(both, 3)
    alone = latents(Session(engine, RED), 3)
    assert torch.allclose(together[:1], alone, atol=1e-5)  # the second row draws noise of its own
    both.prompt(BLUE)
    assert both.moment.prompts == (BLUE, BLUE)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("trained", SlidingWindow(3, None, 6)), ("full", BlockCausal(3)), ("window", SlidingWindow(3, None, 12)),
     ({"name": "window", "window_frames": 4}, SlidingWindow(3, None, 4)), ("sink_window", SinkWindow(3, None, 3, 3))],
)  # fmt: skip
def test_bytes_are_predicted_and_no_others_are_allocated(name, rule):
    engine = toy_engine()
    session = Session(engine, [RED, BLUE], cache=name)
    footprint, seen = engine.footprint(2), session.moment.cache.rule
    assert [seen.block_range(2), [seen.sees(30, k) for k in range(33)]] == [
        rule.block_range(2), [rule.sees(30, k) for k in range(33)],
    ]  # fmt: skip
    for blocks in range(9):
        cache = session.moment.cache
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for _, layers in cache.blocks
                    for kv in layers for x in kv}  # fmt: skip
        assert footprint.after(seen, max(0, blocks - 1)) == cache.bytes == sum(storages.values())
        session.step()


@pytest.mark.parametrize(
    ("mask", "rule"),
    [(BlockCausal(3), SinkWindow(3, 3, 9, 3)), (SlidingWindow(3, None, 12), SinkWindow(3, 3, 9, 3)),
     (SlidingWindow(3, None, 6), SinkWindow(3, 3, 3, 3)), (SlidingWindow(3, None, 3), SinkWindow(3, 3, 3, 3)),
     (SinkWindow(3, None, 6, 3), SinkWindow(3, 3, 6, 3)), (BlockCausal(3, 1), SinkWindow(3, 1, 11, 1))],
)  # fmt: skip
def test_a_sink_and_its_window_are_as_long_as_what_training_saw_with_a_block_at_least(mask, rule):
    assert SinkAndWindow().rule(mask, 12) == rule


def test_positions_are_those_of_the_policy():
    engine = toy_engine()
    sink = {"name": "sink_window", "window_frames": 3, "sink_frames": 3}
    streams = {
        p: latents(Session(engine, RED, cache={**sink, "position": p}), 5) for p in ("absolute", "window_relative")
    }
    assert torch.equal(*(x[:, :6] for x in streams.values())) and not torch.equal(*(x[:, 9:] for x in streams.values()))
    relative = toy_engine(SinkWindow(3, None, 3, 3), position=WindowRelative())
    assert torch.equal(latents(Session(relative, RED), 5), streams["window_relative"])


def test_the_text_is_projected_once_per_prompt():
    engine = toy_engine()
    calls = []
    for block in engine.network.blocks:
        block.cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
    session = Session(engine, RED)
    latents(session, 4)
    assert len(calls) == 2  # layers
    session.prompt(BLUE)
    latents(session, 4)
    assert len(calls) == 4


@torch.no_grad()
def test_a_long_stream_is_flat():
    session = Session(toy_engine(), RED, keep=2)
    session.prompt(BLUE)
    latents(session, 6)
    held, first = session.moment.cache.bytes, len(session.moment.context)
    for _ in range(150):
        session.step()
    assert session.moment.cache.bytes == held and len(session.moment.context) == first == 1
    assert len(session.marks) == 8 * 156


def test_the_ledger_adds_up():
    session = Session(toy_engine(), RED)
    for _ in range(4):
        session.step()
    rows, summary = list(session.ledger.rows), session.ledger.summary()
    assert [row.block for row in rows] == [0, 1, 2, 3] and rows[0].text > 0 and rows[0].cache == 0 < rows[1].cache
    assert all(row.transformer + row.cache + row.codec <= row.total for row in rows)
    assert summary["frames"] == 5 + 3 * 6 and summary["first_frame_s"] == rows[0].at
    assert sum(summary[f"{part}_share"] for part in ("text", "transformer", "cache", "codec")) == pytest.approx(1)


WRONG = [
    (lambda s: s.prompt("a purple circle moves left"), "unknown word 'purple'"),
    (lambda s: s.prompt(RED, "forget"), "no prompt policy 'forget'"),
    (lambda s: s.prompt([RED, RED]), "1 prompts, and 2 were given"),
    (lambda s: s.video(torch.zeros(3, 3, 5, 4)), r"'f 3 4 4'"),
    (lambda s: s.video(torch.zeros(5, 3, 4, 4), 0.0), "strength must be above 0"),
    (lambda s: s.video(torch.zeros(5, 3, 4, 4), float("nan")), "strength must be above 0"),
    (lambda s: s.video(torch.zeros(2, 5, 3, 4, 4)), "1 rows, and 2 videos"),
    (lambda s: s.image(torch.zeros(3, 4, 4), "sideways"), "no way 'sideways'"),
    (lambda s: s.fork(3), "blocks 0 to 0"),
    (lambda s: Session(s.engine, RED, cache="windw"), "did you mean 'window'"),
    (lambda s: Session(s.engine, RED, cache={"name": "window", "window_frames": 2}), "below block_frames"),
    (lambda s: Session(s.engine, RED, steps=0), "steps must be at least 1"),
    (lambda s: Session(s.engine, RED, steps=[0.5]), "starts from noise"),
    (lambda s: Session(s.engine, RED, steps=[1.0, float("nan")]), "steps: times must be numbers"),
    (lambda s: Session(s.engine, []), "needs a prompt"),
    (lambda s: Session(s.engine, 3), "prompts must be text"),
    (lambda s: Session(s.engine, [None]), "a prompt must be text, got NoneType"),
    (lambda s: s.prompt(None), "prompts must be text"),
    (lambda s: s.prompt([b"a"]), "a prompt must be text, got bytes"),
]


@pytest.mark.parametrize(("do", "message"), WRONG, ids=[w[1] for w in WRONG])
def test_what_is_wrong_is_told_and_changes_nothing(do, message):
    session = Session(toy_engine(), RED)
    with pytest.raises(UserError, match=message):
        do(session)
    assert session.recorded == () and torch.equal(latents(session, 1), latents(Session(session.engine, RED), 1))


def test_more_video_than_may_be_held_ends_the_record_and_not_the_stream():
    session = Session(toy_engine(), RED, record_bytes=400)
    session.video(pixels(session.engine, 5), 0.8)
    session.video(pixels(session.engine, 6), 0.8)
    latents(session, 2)
    with pytest.raises(UserError, match="no record"):
        records.record(session)
    assert session.fork().block == 2


def test_moments_that_are_held_need_no_record():
    """Without one, going back to them gives what a session with a record gives; going further is one clear error."""
    engine = toy_engine()
    bare, whole = Session(engine, RED, keep=2, record_bytes=10), Session(engine, RED)
    for session in (bare, whole):
        latents(session, 2)
        session.video(pixels(engine, 18), 0.8)
        latents(session, 2)
        session.prompt(BLUE, "recache")
        session.step()
    assert [bare.replayed(block) for block in range(6)] == [0, 1, 2, 0, 0, 0]
    for block in (3, 4, 5, 0):
        one, other = bare.fork(block), whole.fork(block)
        assert one.digest == other.digest
        assert one.moment.prompts == other.moment.prompts == ((BLUE,) if block == 5 else (RED,))
        assert same([one.step()], [other.step()])
        with pytest.raises(UserError, match="no record"):
            records.record(one)
    for session in (bare, whole):
        session.seek(4)
    assert bare.moment.prompts == (RED,) and same([bare.step(), bare.step()], [whole.step(), whole.step()])
    with pytest.raises(UserError, match="no record"):
        bare.fork(2)


@pytest.mark.parametrize("keep", [0, 1, 9])
def test_going_back_does_what_was_done_once(keep):
    engine = toy_engine()
    session = Session(engine, RED, keep=keep)
    session.step()
    session.video(pixels(engine, 12), 0.8)
    assert session.fork().waiting == 12 and session.fork(1).waiting == 0
    session.step()
    assert session.fork(1).waiting == 0 and session.fork(2).waiting == 6
    session.step()
    assert session.fork(2).waiting == 6


def test_a_script_is_cut_to_its_frames_and_so_is_its_replay(tmp_path):
    engine = toy_engine()
    script = Script(((0, RED), (6, BLUE)), 14, record=tmp_path / "in" / "s")
    play = Play(engine, script)
    made = torch.cat(list(play))
    play.write_record()
    again = torch.cat(list(Play(engine, Script(replay=tmp_path / "in" / "s"))))
    assert len(made) == 14 and torch.equal(made, again)
    session = Session(engine, RED)
    first = session.step().frames[0]
    session.prompt(BLUE)
    assert torch.equal(made, torch.cat([first, session.step().frames[0], session.step().frames[0]])[:14])
    stopped = Play(engine, script)
    next(iter(stopped))
    stopped.write_record()  # of what was made until then
    assert torch.equal(torch.cat(list(Play(engine, Script(replay=tmp_path / "in" / "s")))), made[:5])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(((0, RED), (14, BLUE)), "frame 14 is not in a video of 14 frames"),
     (((0, RED), (4, BLUE)), r"frames 0 and 4 are both in block 0 \(frames 0 to 4\)"),
     (((0, RED), (6, BLUE), (10, RED)), r"frames 6 and 10 are both in block 1 .* from frame 11 on")],
)  # fmt: skip
def test_no_prompt_is_dropped(prompts, message):
    with pytest.raises(UserError, match=message):
        Play(toy_engine(), Script(prompts, 14))


def recorded(tmp_path, engine):
    session = Session(engine, RED)
    session.video(pixels(engine, 5), 0.8)
    session.step()
    session.prompt(BLUE)
    session.step()
    path = tmp_path / "s.session"
    records.write(path, records.record(session))
    return path


def rewritten(path, change):
    """The file with its body changed and sealed again: what only a person who means it does."""
    tensors, metadata = weights.read_tensors(path)
    body = json.loads(metadata["body"])
    change(body, tensors)
    text = json.dumps(body, sort_keys=True)
    weights.write_tensors(path, tensors, {**metadata, "body": text, "seal": records._seal(text, tensors)})


def test_a_damaged_or_changed_file_is_one_clear_error(tmp_path):
    engine = toy_engine()
    path = recorded(tmp_path, engine)
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError):
            records.read(path)
    for bad in (b"", b"x" * 50, content[:-3], content + b"x"):
        path.write_bytes(bad)
        with pytest.raises(UserError):
            records.read(path)
    with pytest.raises(UserError, match="does not exist"):
        records.read(tmp_path / "none")
    weights.write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="no session file"):
        records.read(path)


CHANGES = [
    (lambda b, t: b["events"].pop(), "is not the recorded one: versions and threads are equal"),
    (lambda b, t: b["start"].update(seed=7), "block 0 is not the recorded one"),
    (lambda b, t: b["environment"].update(threads="99") or b["start"].update(seed=7), r"threads 1 \(was 99\)"),
    (lambda b, t: b["identity"].update(network="0" * 64), "another model: network is"),
    (lambda b, t: b["events"][0].__setitem__(0, "dance"), "does not hold a session"),
    (lambda b, t: b["events"][0][2].update(strength="much"), "does not hold a session"),
    (lambda b, t: b["events"].reverse(), "does not hold a session"),
    (lambda b, t: b.update(blocks=10**9), "does not hold a session"),
    (lambda b, t: b["start"].update(steps=[1.0, "x"]), "does not hold a session"),
    (lambda b, t: b["start"].update(prompts=[1]), "does not hold a session"),
    (lambda b, t: b.update(frames=0), "does not hold a session"),
    (lambda b, t: b.pop("marks"), "does not hold a session"),
    (lambda b, t: t.clear(), "does not hold a session"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=range(len(CHANGES)))
def test_a_file_that_tells_another_stream_is_found_out(change, message, tmp_path):
    engine = toy_engine()
    path = recorded(tmp_path, engine)
    rewritten(path, change)
    with pytest.raises(UserError, match=message):
        list(records.replay(engine, records.read(path)))
