"""From clips to a store: counts add up, a second run does nothing, nothing mixes, released data is converted."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import platform
import socket
import subprocess
import sys
from datetime import timedelta

import av
import lmdb
import numpy as np
import pytest
import torch
import typer
from commands import command
from PIL import Image
from typer.testing import CliRunner
from videos import levels, sound, turned, video

from causvid import cli, cli_data, spec
from causvid.build import World
from causvid.data import encode as encoding
from causvid.data import pack as packing
from causvid.data import steps
from causvid.data.clips import Wanted
from causvid.data.encode import encode, from_file
from causvid.data.folders import Folder
from causvid.data.latents import load
from causvid.data.lmdb_store import Reader
from causvid.data.tally import Tally
from causvid.errors import UserError
from causvid.models.codecs import TimeFold
from causvid.models.text import Words

WANTED = Wanted(16, 16, 5, 10, aspect=2)
WORDS = ("a", "cat", "dog", "runs")
IDENTITY = {"codec": {"name": "time_fold", "frames": 2}, "text_encoder": {"name": "words", "dim": 4, "length": 6}}


def clips(folder):
    """Good and bad clips under a manifest; returns its path and how many rows are good."""
    folder.mkdir()
    good = video(levels(20))
    content = {
        "good.mp4": good, "turned.mp4": turned(good, 90), "uneven.mp4": video(levels(6), [0, 40, 400, 440, 900, 1000]),
        "odd.mp4": video(levels(20, 47, 63)), "sound.mp4": sound(), "short.mp4": video(levels(3)),
        "cut.mp4": good[: len(good) // 2], "empty.mp4": b"", "wide.mp4": video(levels(20, 16, 64)),
    }  # fmt: skip
    for name, data in content.items():
        (folder / name).write_bytes(data)
    rows = [{"path": name, "caption": "a cat runs"} for name in [*content, "missing.mp4", "../good.mp4", "good.mp4"]]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "m.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A manifest taken through every step."""
    folder = tmp_path_factory.mktemp("made")
    tallies = [steps.process(clips(folder / "raw"), str(folder / "clips"), WANTED, workers=1)]
    tallies.append(encode_into(folder / "clips", folder / "latents"))
    tallies.append(packing.pack(str(folder / "latents"), str(folder / "store")))
    return folder, tallies


def encode_into(source, target, rank=0, world=1, identity=IDENTITY):
    return encode(str(source), str(target), TimeFold(2), Words(WORDS, 4, 6), identity, rank, world)


def test_counts_add_up_and_reasons_are_told(made):
    folder, (processed, encoded, packed) = made
    assert processed.as_json() == {"given": 12, "done": 4, "skipped": 1, "quarantined": 7} and processed.status == 3
    listed = [json.loads(line) for line in (folder / "clips" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["clip"]: row["reason"] for row in listed}.keys() == {
        "sound.mp4", "short.mp4", "cut.mp4", "empty.mp4", "wide.mp4", "missing.mp4", "row 11"
    }  # fmt: skip
    assert all(row["reason"] for row in listed)
    assert encoded.as_json() == {"given": 4, "done": 4, "skipped": 0, "quarantined": 0} and encoded.status == 0
    assert packed.as_json() == {"given": 4, "done": 4, "skipped": 0, "quarantined": 0}


def test_the_store_holds_what_was_encoded(made):
    folder, _ = made
    reader = Reader(folder / "store")
    assert {entry.shape("latents") for entry in reader.entries.values()} == {(3, 6, 16, 16)}
    key = next(key for key in reader.entries if key.startswith("good"))
    row = reader.row(key)
    again = from_file((folder / "latents" / "latents" / f"{key}.safetensors").read_bytes())
    assert np.array_equal(row.arrays["latents"], again.arrays["latents"])
    assert row.facts["caption"] == "a cat runs" and row.arrays["text"].shape == (3, 4)
    # levels 0, 2, 5, 7, 10 of the good clip, in [-1, 1]; the first frame alone, then pairs
    pixels = TimeFold(2).decode(torch.from_numpy(row.arrays["latents"].astype(np.float32))[None])[0].mean((1, 2, 3))
    assert pixels == pytest.approx([(10 + 4 * n) / 127.5 - 1 for n in (0, 2, 5, 7, 10)], abs=0.02)
    assert reader.header["codec"] == IDENTITY["codec"] and reader.damaged() == {}


def test_a_second_run_does_nothing(made):
    folder, _ = made
    before = Reader(folder / "store").digest()
    gc.collect()
    assert steps.process(str(folder / "raw" / "m.jsonl"), str(folder / "clips"), WANTED, workers=1).as_json() == {
        "given": 12, "done": 0, "skipped": 5, "quarantined": 7
    }  # fmt: skip
    assert encode_into(folder / "clips", folder / "latents").skipped == 4
    assert packing.pack(str(folder / "latents"), str(folder / "store")).skipped == 4
    assert Reader(folder / "store").digest() == before


def test_other_options_or_another_codec_never_mix_in(made):
    folder, _ = made
    with pytest.raises(UserError, match="other options .fps.*choose another folder"):
        steps.process(str(folder / "raw"), str(folder / "clips"), Wanted(16, 16, 5, 8))
    with pytest.raises(UserError, match="other options .codec"):
        encode_into(folder / "clips", folder / "latents", identity={**IDENTITY, "codec": {"name": "other"}})


def test_ranks_share_the_work(made, tmp_path):
    folder, _ = made
    tallies = [encode_into(folder / "clips", tmp_path / "latents", rank, 3) for rank in range(3)]
    assert [tally.given for tally in tallies] == [2, 1, 1] and all(tally.done == tally.given for tally in tallies)
    packing.pack(str(tmp_path / "latents"), str(tmp_path / "store"), shards=2)
    assert Reader(tmp_path / "store").digest() == Reader(folder / "store").digest()


def test_verify_passes_and_tells_damage(made, tmp_path):
    folder, _ = made
    tally, found = packing.verify(str(folder / "store"))
    assert tally.as_json() == {"given": 4, "done": 4, "skipped": 0, "quarantined": 0}
    assert found["digest"] == json.loads((folder / "store" / "digest.json").read_text())["digest"]
    packing.pack(str(folder / "store"), str(tmp_path / "copy"))
    path = tmp_path / "copy" / "data.mdb"
    content = bytearray(path.read_bytes())
    with_data = Reader(folder / "store").row(next(iter(found_keys(folder)))).arrays["latents"].tobytes()
    content[content.find(with_data) + 100] ^= 4
    path.write_bytes(content)
    tally, _ = packing.verify(str(tmp_path / "copy"), str(tmp_path / "bad"))
    assert (tally.done, len(tally.quarantine), tally.status) == (3, 1, 3)
    assert len((tmp_path / "bad" / "quarantine.jsonl").read_text().splitlines()) == 1


def test_verify_clears_what_a_killed_one_left_half_written(made, tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    (tmp_path / f".quarantine.jsonl.{platform.node()}.{gone.pid}.partial").write_bytes(b"{")
    packing.verify(str(made[0] / "store"), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["quarantine.jsonl"]


def found_keys(folder):
    return list(Reader(folder / "store").entries)


def test_damaged_latents_are_put_aside(made, tmp_path):
    folder, _ = made
    for source in (folder / "latents").rglob("*.*"):
        target = tmp_path / "latents" / source.relative_to(folder / "latents")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    first, second, *_ = sorted((tmp_path / "latents" / "latents").iterdir())
    content = bytearray(first.read_bytes())
    content[-7] ^= 1
    first.write_bytes(content)
    second.rename(second.with_name("another.safetensors"))
    tally = packing.pack(str(tmp_path / "latents"), str(tmp_path / "store"))
    assert (tally.done, len(tally.quarantine)) == (2, 2)
    assert "checksum is wrong" in str(tally.quarantine) and "says that it is row" in str(tally.quarantine)


def released(folder, array, prompts, shape=None):
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number, (row, prompt) in enumerate(zip(array, prompts, strict=True)):
            transaction.put(f"latents_{number}_data".encode(), row.astype(np.float16).tobytes())
            transaction.put(f"prompts_{number}_data".encode(), prompt.encode())
        if shape:
            transaction.put(b"latents_shape", " ".join(map(str, shape)).encode())


def test_the_released_layout_is_converted(tmp_path):
    array = np.random.default_rng(0).standard_normal((12, 3, 4, 2, 2)).astype(np.float16)
    released(tmp_path / "old", array, [f"prompt {n}" for n in range(12)], (99, 3, 4, 2, 2))  # its count is not trusted
    tally = packing.pack(str(tmp_path / "old"), str(tmp_path / "new"))
    assert tally.as_json() == {"given": 12, "done": 12, "skipped": 0, "quarantined": 0}
    reader = Reader(tmp_path / "new")
    for number in range(12):
        row = reader.row(f"{number:08d}")
        assert np.array_equal(row.arrays["latents"], array[number]) and row.facts["caption"] == f"prompt {number}"


def test_released_pairs_need_their_times(tmp_path):
    array = np.zeros((2, 4, 3, 4, 2, 2), np.float16)
    released(tmp_path / "old", array, ["a", "b"], array.shape)
    with pytest.raises(UserError, match="hold 4 states; give as many --times"):
        packing.pack(str(tmp_path / "old"), str(tmp_path / "new"))
    packing.pack(str(tmp_path / "old"), str(tmp_path / "new"), times=[1, 0.7568, 0.5217, 0])
    reader = Reader(tmp_path / "new")
    assert reader.header["times"] == [1, 0.7568, 0.5217, 0]
    assert reader.row("00000001").arrays["states"].shape == (4, 3, 4, 2, 2)


@pytest.mark.parametrize(
    "wrong",
    ["nan,0", "inf,0", "1,nan", "2,0", "1,1", "0.5,1", "0,-1", "1,0.5", "0,1", "1,0,", "1,,0", ",", "x,0", "1,0,0"],
)  # fmt: skip
def test_times_that_do_not_fall_from_noise_to_data_are_refused_and_nothing_is_written(wrong, tmp_path, capsys):
    released(tmp_path / "old", np.zeros((1, 2, 3, 4, 2, 2)), ["a"], (1, 2, 3, 4, 2, 2))
    before = content(tmp_path)
    status, counts, err = command(capsys, "pack", tmp_path / "old", tmp_path / "new", f"--times={wrong}")
    assert status == 2 and not counts and err.count("error:") == 1 and "--times" in err, err
    assert content(tmp_path) == before and not (tmp_path / "new").exists()


def test_a_shape_that_is_none_is_refused(tmp_path, capsys):
    released(tmp_path / "old", np.zeros((1, 3, 4, 2, 2)), ["a"])
    for wrong in ("3,4,2", "3,4,2,0", "-3,4,2,2", "3,,4,2,2", "3.5,4,2,2"):
        status, _, err = command(capsys, "pack", tmp_path / "old", tmp_path / "new", f"--shape={wrong}")
        assert status == 2 and err.count("error:") == 1 and "--shape" in err, err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["latents", "store"])
def test_shape_and_times_are_refused_where_nothing_reads_them(kind, made, tmp_path, capsys):
    for option in ("--times=1,0", "--shape=3,6,16,16"):
        status, _, err = command(capsys, "pack", made[0] / kind, tmp_path / "new", option)
        assert status == 2 and "for the released layout alone" in err
    assert not (tmp_path / "new").exists()


def test_released_rows_of_a_wrong_size_are_put_aside(tmp_path):
    released(tmp_path / "old", [np.zeros((3, 4, 2, 2)), np.zeros((3, 4, 2, 1))], ["a", "b"])
    with pytest.raises(UserError, match="shape of a row is not stored; give --shape"):
        packing.pack(str(tmp_path / "old"), str(tmp_path / "new"))
    tally = packing.pack(str(tmp_path / "old"), str(tmp_path / "new"), shape=[3, 4, 2, 2])
    assert tally.done == 1 and "has 48 bytes; rows of shape (3, 4, 2, 2) have 96" in str(tally.quarantine)


def test_a_spec_trains_from_a_store(made):
    folder, _ = made
    options = [f"world.dataset={{name: store, path: {folder / 'store'}, shape: [3, 6, 16, 16]}}"]
    options += ["world.text_encoder={name: words, dim: 4, length: 6}", "world.codec={name: time_fold, frames: 2}"]
    world = World(spec.load("tiny/causvid", options))
    latents, text, free = world.batch(range(8))
    assert latents.shape == (8, 3, 6, 16, 16) and latents.dtype == torch.float32
    assert torch.equal(text.embeddings, Words(WORDS, 4, 6).encode(["a cat runs"] * 8).embeddings)
    assert torch.equal(free.embeddings, torch.zeros(8, 6, 4))
    per_epoch = [tuple(float(x) for x in world.batch(range(4 * e, 4 * e + 4))[0].sum((1, 2, 3, 4))) for e in range(6)]
    assert len({tuple(sorted(epoch)) for epoch in per_epoch}) == 1 and len(set(per_epoch)) > 1
    pixels, captions = world.pixels(range(2), "test")
    assert pixels.shape == (2, 5, 3, 16, 16) and captions == ["a cat runs"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("world.codec={name: time_fold, frames: 4}", "was made with codec"),
        (
            "world.dataset.shape=[9, 6, 16, 16]",
            r"has 0 rows of shape \[9, 6, 16, 16\].*holds the shapes \[3, 6, 16, 16\]",
        ),
        ("world.dataset.held_out=4", "of which 4 are held out"),
        ("world.dataset.path=/nowhere", "no store at /nowhere"),
    ],
)
def test_a_store_that_does_not_fit_the_spec_is_refused(made, change, message):
    folder, _ = made
    options = [f"world.dataset={{name: store, path: {folder / 'store'}, shape: [3, 6, 16, 16]}}"]
    options += [
        "world.text_encoder={name: words, dim: 4, length: 6}",
        "world.codec={name: time_fold, frames: 2}",
        change,
    ]
    with pytest.raises(UserError, match=message):
        World(spec.load("tiny/causvid", options)).batch([0])


def test_the_loader_resumes_in_the_middle(made):
    folder, _ = made
    whole = [latents for latents, _, _ in load(str(folder / "store"), 3, seed=1, stop=6)]
    rest = [latents for latents, _, _ in load(str(folder / "store"), 3, start=2, seed=1, stop=6)]
    assert len(whole) == 6 and all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_every_step_in_memory(made):
    """The same clips through an object store, to the same digest."""
    folder, _ = made
    raw = Folder("memory://data/raw")
    for path in (folder / "raw").iterdir():
        raw.write(path.name, path.read_bytes())
    fetched = steps.download("memory://data/raw/m.jsonl", "memory://data/fetched")
    assert fetched.as_json() == {"given": 12, "done": 8, "skipped": 1, "quarantined": 3}
    assert steps.download("memory://data/raw/m.jsonl", "memory://data/fetched").skipped == 9
    steps.process("memory://data/raw/m.jsonl", "memory://data/clips", WANTED, workers=1)
    encode_into("memory://data/clips", "memory://data/latents")
    packing.pack("memory://data/latents", "memory://data/store")
    tally, found = packing.verify("memory://data/store")
    assert tally.done == 4 and found["digest"] == Reader(folder / "store").digest()


def hashed(folder, count=1):
    """Files with a manifest that gives their checksums, but for the last; returns its path."""
    folder.mkdir()
    rows = []
    for number in range(count + 1):
        content = f"{number}".encode() * 1000
        (folder / f"{number}.mp4").write_bytes(content)
        rows.append({"path": f"{number}.mp4", "id": str(number), "sha256": hashlib.sha256(content).hexdigest()})
    del rows[-1]["sha256"]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "m.jsonl")


def test_a_copy_that_is_there_is_compared_with_the_checksum_of_the_manifest(tmp_path):
    listed, target = hashed(tmp_path / "raw"), str(tmp_path / "out")
    first, second = (tmp_path / "out" / "clips" / f"{number}.mp4" for number in range(2))
    assert steps.download(listed, target).done == 2 and steps.download(listed, target).skipped == 2
    for path in (first, second):
        path.write_bytes(b"x" * 1000)  # of the same size
    assert steps.download(listed, target).as_json() == {"given": 2, "done": 2, "skipped": 0, "quarantined": 0}
    assert first.read_bytes() == b"0" * 1000 and second.read_bytes() == b"1" * 1000
    first.write_bytes(b"x" * 1000)
    (tmp_path / "raw" / "0.mp4").unlink()
    assert steps.download(listed, target).as_json() == {"given": 2, "done": 0, "skipped": 1, "quarantined": 1}
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 1
    assert "does not exist" in (tmp_path / "out" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("base", ["", "memory://mistaken"])
def test_a_clip_that_is_not_the_one_of_the_manifest_is_put_aside(base, tmp_path):
    raw = Folder(f"{base or tmp_path}/raw")
    rows = []
    for name, film in (("a", levels(21)), ("b", levels(23))):
        raw.write(f"{name}.mp4", video(film))
        meant = raw.read("a.mp4")  # so b.mp4 is another file than is meant
        rows.append({"path": f"{name}.mp4", "id": name, "sha256": hashlib.sha256(meant).hexdigest()})
    raw.write("m.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    source = f"{raw}/m.jsonl"
    for name, call in {
        "download": lambda out: steps.download(source, out),
        "process": lambda out: steps.process(source, out, WANTED, workers=1),
        "encode": lambda out: encode_into(source, out),
    }.items():
        tally = call(str(tmp_path / name))
        assert tally.as_json() == {"given": 2, "done": 1, "skipped": 0, "quarantined": 1}, name
        (row,) = tally.quarantine
        assert row["clip"] == "b.mp4" and "its SHA-256 is not the one in the manifest" in row["reason"]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock.mdb"}  # fmt: skip


def test_a_pack_that_stopped_between_its_shards_goes_on(made, tmp_path, monkeypatch):
    """A disk that is full when the fourth of eight environments is made, and has room the second time."""
    source, target = str(made[0] / "latents"), tmp_path / "store"

    class Full(packing.Writer):
        def __init__(self, folder, header):
            if folder.name.startswith("shard-00003"):
                raise UserError("the disk is full")
            super().__init__(folder, header)

    with monkeypatch.context() as during, pytest.raises(UserError, match="full"):
        during.setattr(packing, "Writer", Full)
        packing.pack(source, str(target), shards=8)
    for wrong in (1, 3, 4):
        with pytest.raises(UserError, match="of 8 shards.*say --shards 8"):
            packing.pack(source, str(target), shards=wrong)
    assert not (target / "data.mdb").exists()
    assert packing.pack(source, str(target), shards=8).done == 4
    assert packing.verify(str(target))[1]["digest"] == Reader(made[0] / "store").digest()
    assert len(list(target.glob("shard-*"))) == 8


def test_a_store_is_not_finished_while_rows_are_added(made, tmp_path, monkeypatch):
    """What stops a second pack must not leave the first one's digest beside rows that it doesn't know."""
    folder, store = made[0], tmp_path / "store"
    packing.pack(str(folder / "latents"), str(store))
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(packing, "_add", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        packing.pack(str(folder / "latents"), str(store))
    gc.collect()
    assert not (store / "digest.json").exists()
    with pytest.raises(UserError, match="is not finished.*pack' again"):
        packing.verify(str(store))
    assert packing.pack(str(folder / "latents"), str(store)).skipped == 4 and packing.verify(str(store))[0].done == 4


def test_a_pack_that_is_refused_leaves_a_whole_store_whole(made, tmp_path):
    source, store, other = str(made[0] / "latents"), tmp_path / "store", tmp_path / "other"
    packing.pack(source, str(store))
    packing.pack(source, str(tmp_path / "shards"), shards=2)
    (tmp_path / "link").symlink_to(store)
    encode_into(made[0] / "clips", other, identity={**IDENTITY, "codec": {"name": "time_fold", "frames": 4}})
    before = content(tmp_path)
    for origin, target, shards, message in (
        (source, "store", 2, "say --shards 1"), (source, "shards", 1, "say --shards 2"),
        (str(other), "store", 1, "another kind"), (str(store), "store", 1, "same place"),
        (str(store), "link", 1, "same place"), (str(tmp_path / "shards"), "shards/", 2, "same place"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            packing.pack(origin, f"{tmp_path}/{target}", shards)
        assert content(tmp_path) == before
    assert packing.verify(str(store))[0].done == packing.verify(str(tmp_path / "shards"))[0].done == 4


def test_a_pack_into_an_lmdb_of_another_layout_leaves_it_as_it_was(made, tmp_path):
    with lmdb.open(str(tmp_path / "old")) as environment, environment.begin(write=True) as write:
        write.put(b"latents_shape", b"1 2 4 8 8")
    before = content(tmp_path)
    with pytest.raises(UserError, match="another layout"):
        packing.pack(str(made[0] / "latents"), str(tmp_path / "old"))
    assert content(tmp_path) == before


def test_the_command_line_counts_and_ends(made, tmp_path):
    folder, _ = made
    runner = CliRunner()

    def call(*arguments):
        found = runner.invoke(cli.app, ["data", *map(str, arguments)])
        return found.exit_code, found.stdout.strip().splitlines()[-1] if found.stdout.strip() else ""

    status, line = call("inspect", folder / "store", tmp_path, "--json")
    assert status == 0 and json.loads(line)["summary"]["rows"] == 4
    assert (tmp_path / "contact_sheet.png").read_bytes()[:4] == b"\x89PNG"
    status, line = call("process", folder / "raw" / "m.jsonl", folder / "clips", "--height", 16, "--width", 16,
                        "--frames", 5, "--fps", 10, "--json", "--workers", 1)  # fmt: skip
    assert status == 3 and json.loads(line)["quarantined"] == 7
    assert call("pack", folder / "latents", tmp_path / "store")[0] == 0


def test_an_output_that_is_its_own_input_is_refused_untouched(made, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "good.mp4").write_bytes(video(levels(20)))
    (tmp_path / "raw" / "manifest.jsonl").write_text('{"path": "good.mp4"}\n')
    (tmp_path / "link").symlink_to("raw")
    before = content(tmp_path)
    for origin, target in (("raw", "raw"), ("raw", "link/"), ("raw/manifest.jsonl", "raw")):
        for step in ("download", "process", "encode"):
            found = CliRunner().invoke(cli.app, ["data", step, str(tmp_path / origin), f"{tmp_path}/{target}"])
            assert isinstance(found.exception, UserError) and "same place" in str(found.exception)  # exit status 2
            assert content(tmp_path) == before


@pytest.mark.parametrize("step", ["download", "process", "encode", "pack", "verify", "inspect"])
def test_an_empty_path_is_no_folder_and_nothing_is_written(step, tmp_path, monkeypatch):
    """Where it named the root of the disk, OUTPUT was written there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(b"x")
    before = content(tmp_path)
    monkeypatch.setattr(Folder, "write", lambda *given: pytest.fail(f"writes {given}"))
    for paths in (("raw", ""), ("", "out"), ("raw", " ")):
        found = CliRunner().invoke(cli.app, ["data", step, *paths])
        assert isinstance(found.exception, UserError) and "is empty" in str(found.exception)  # exit status 2
    assert content(tmp_path) == before


def test_an_output_inside_its_input_is_refused_untouched(tmp_path):
    """The second run would take the clips of the first for input, as it would where INPUT is OUTPUT/clips."""
    (tmp_path / "raw" / "clips").mkdir(parents=True)
    (tmp_path / "raw" / "clips" / "a.mp4").write_bytes(video(levels(20)))
    (tmp_path / "link").symlink_to("raw")
    before = content(tmp_path)
    refused = [(step, "raw", target) for step in ("download", "process", "encode", "pack") for target in
               ("raw/out", "link/a/b", "raw//out/")]  # fmt: skip
    for step, origin, target in [*refused, ("process", "raw/clips", "raw"), ("download", "raw/clips", "link/")]:
        found = CliRunner().invoke(cli.app, ["data", step, f"{tmp_path}/{origin}", f"{tmp_path}/{target}"])
        assert isinstance(found.exception, UserError) and "INPUT" in str(found.exception)  # exit status 2
        assert content(tmp_path) == before


def test_an_output_beside_a_manifest_or_a_folder_of_a_like_name_is_taken(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(b"x")
    for name in ("m.jsonl", "manifest.jsonl"):
        (tmp_path / name).write_text('{"path": "a.mp4"}\n')
        assert steps.download(str(tmp_path / name), f"{tmp_path}/out-{name}").done == 1
    assert steps.download(str(tmp_path / "raw"), f"{tmp_path}/raw2").done == 1


def test_every_common_kind_of_file_is_a_clip_and_others_are_told(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for name, form, codec in (
        ("a.ts", "mpegts", "libx264"), ("b.FLV", "flv", "flv1"), ("c.wmv", "asf", "wmv2"), ("d.ogv", "ogg", "libvpx"),
        ("e.3gp", "3gp", "libx264"), ("f.bmp", "image2pipe", "bmp"), ("g.tiff", "image2pipe", "tiff"),
    ):  # fmt: skip
        with av.open(str(tmp_path / "raw" / name), "w", format=form) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr24" if codec == "bmp" else "yuv420p"
            stream.pix_fmt = "rgb24" if codec == "tiff" else stream.pix_fmt
            for image in levels(1 if form == "image2pipe" else 20):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stream.pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    (tmp_path / "raw" / "h.webp").write_bytes(webp(levels(1)[0]))
    for name in ("a.txt", "notes.txt", "list.m3u8"):
        (tmp_path / "raw" / name).write_text("a cat")
    wanted = Wanted(16, 16, 5, 10, aspect=2, pictures=True)
    tally = steps.process(str(tmp_path / "raw"), str(tmp_path / "out"), wanted, workers=1)
    assert tally.as_json() == {"given": 8, "done": 8, "skipped": 0, "quarantined": 0}, tally.quarantine
    assert "2 files are passed over, by name no clips: list.m3u8, notes.txt. Clips" in capsys.readouterr().err


def webp(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP")
    return stream.getvalue()


def test_a_file_that_is_named_like_a_released_artefact_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "causvid-list.csv").write_text("path,caption\na.mp4,a cat\n")
    found = CliRunner().invoke(cli.app, ["data", "download", "causvid-list.csv", "out", "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout)["done"] == 1


def test_reasons_that_stand_in_no_file_are_told(capsys):
    tally = Tally(1)
    tally.put_aside("r1", "is damaged")
    with pytest.raises(typer.Exit):
        cli_data._end(tally, "store", True, listed=False)
    told = capsys.readouterr()
    assert json.loads(told.out)["quarantine"] == [{"clip": "r1", "reason": "is damaged"}]
    assert "r1: is damaged" in told.err


def test_an_empty_store_is_nothing_given(tmp_path):
    fields = {"latents": {"dtype": "float16", "shape": [None, 4, 8, 8]}}
    with packing.Writer(tmp_path / "store", {"fields": fields}):
        pass
    gc.collect()
    for verb, *target in (("pack", "out"), ("verify",), ("inspect", "out")):
        found = CliRunner().invoke(
            cli.app, ["data", verb, str(tmp_path / "store"), *(f"{tmp_path}/{t}" for t in target)]
        )
        assert isinstance(found.exception, UserError) and "nothing given: " in str(found.exception)  # exit status 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["", "memory://changed"])
def test_a_changed_source_or_a_damaged_result_is_made_anew(base, tmp_path):
    raw, out = Folder(f"{base or tmp_path}/raw"), Folder(f"{tmp_path}/out")

    def outcome():
        tally = steps.process(str(raw), str(out), WANTED, workers=1)
        return tally.done, tally.skipped

    raw.write("a.mp4", video(levels(20)))
    assert [outcome(), outcome()] == [(1, 0), (0, 1)]
    (name,) = (name for name in out.sizes() if name.endswith(".mp4"))
    first = out.read(name)
    out.write(name, first[:-1] + bytes([first[-1] ^ 1]))
    assert [outcome(), outcome()] == [(1, 0), (0, 1)] and out.read(name) == first
    raw.write("a.mp4", video(levels(30)[10:]))
    assert [outcome(), outcome()] == [(1, 0), (0, 1)] and out.read(name) != first


@pytest.mark.parametrize("base", ["", pytest.param("memory://encoded", marks=pytest.mark.slow)])
def test_encode_knows_a_clip_of_a_folder_by_its_file(base, tmp_path, capsys):
    raw, out = Folder(f"{base or tmp_path}/raw"), Folder(f"{base or tmp_path}/latents")

    def outcome():
        tally = encode_into(raw, out)
        rows = [from_file(out.read(name)) for name in out.sizes() if name.startswith("latents/")]
        first = {row.facts["source"]["path"]: round(float(row.arrays["latents"][0].mean()), 1) for row in rows}
        return (tally.done, tally.skipped, len(tally.quarantine)), first

    a, b, c = (video(levels(60)[start : start + 5]) for start in (0, 25, 50))
    raw.write("b.mp4", b)
    raw.write("c.mp4", c)
    assert outcome() == ((2, 0, 0), {"b.mp4": -0.1, "c.mp4": 0.6})
    raw.write("a.mp4", a)  # every clip now has another row number
    assert outcome() == ((1, 2, 0), {"a.mp4": -0.9, "b.mp4": -0.1, "c.mp4": 0.6})
    raw.write("b.mp4", c)
    raw.fs.rm_file(raw.join("a.mp4"))
    capsys.readouterr()
    assert outcome() == ((1, 1, 0), {"a.mp4": -0.9, "b.mp4": 0.6, "c.mp4": 0.6})
    assert "1 files of latents are of clips that INPUT does not give, as latents/a-" in capsys.readouterr().err
    raw.write("c.mp4", c[:500])  # what it was before must not be packed
    assert outcome() == ((0, 1, 1), {"a.mp4": -0.9, "b.mp4": 0.6})


def test_encode_puts_parts_of_films_aside(tmp_path):
    """It would encode the whole film; process cuts."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(video(levels(5)))
    (tmp_path / "raw" / "m.csv").write_text("path,start,end\na.mp4,,\na.mp4,0.1,\na.mp4,,0.1\n")
    tally = encode_into(tmp_path / "raw" / "m.csv", tmp_path / "latents")
    assert tally.as_json() == {"given": 3, "done": 1, "skipped": 0, "quarantined": 2}
    assert "'causvid data process' cuts it" in tally.quarantine[0]["reason"]


def test_clips_whose_names_begin_alike_keep_their_copies(tmp_path):
    """Copies of clips from elsewhere lay beside one another, and those of 'a.b' went with 'a'."""
    raw = Folder("memory://alike")
    for name in ("a", "a.b", "a.b.c"):
        raw.write(f"{name}.mp4", video(levels(5)))
    raw.write("m.jsonl", b"".join(b'{"path": "%b.mp4", "id": "%b"}\n' % (n, n) for n in (b"a", b"a.b", b"a.b.c")))
    assert encode_into("memory://alike/m.jsonl", tmp_path / "latents").done == 3


def test_one_command_at_a_time_fills_a_folder(made, tmp_path):
    folder, _ = made
    calls = {
        "download": lambda: steps.download(str(folder / "raw" / "m.jsonl"), out),
        "process": lambda: steps.process(str(folder / "raw" / "m.jsonl"), out, WANTED, workers=1),
        "pack": lambda: packing.pack(str(folder / "latents"), out),
    }
    for name, call in calls.items():
        out = str(tmp_path / name)
        with steps.alone(out), pytest.raises(UserError, match="another command is at work there"):
            call()
        assert content(tmp_path / name) == {}
    assert packing.pack(str(folder / "latents"), out).done == 4


def test_clips_of_another_input_are_told(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for name in "ab":
        (tmp_path / "raw" / f"{name}.mp4").write_bytes(name.encode())
        (tmp_path / "raw" / f"{name}.csv").write_text(f"path,caption\n{name}.mp4,x\n")
        steps.download(str(tmp_path / "raw" / f"{name}.csv"), str(tmp_path / "out"))
    assert "1 clips of another INPUT are there; manifest.jsonl lists this INPUT's alone" in capsys.readouterr().err


def test_a_process_without_its_torchrun_ends(tmp_path, monkeypatch):
    """torchrun was killed while the process started: nobody would ever gather its counts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, and nobody listens
        for name, value in {
            "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "1", "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(encoding, "PATIENCE", timedelta(seconds=1))
        with pytest.raises(UserError, match="torchrun can't be reached"):
            encode_into(tmp_path / "raw", tmp_path / "latents", 1, 2)
    assert not (tmp_path / "latents").exists()
