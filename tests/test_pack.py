"""What pack and verify refuse, put aside, or say of what they are given."""

from __future__ import annotations

import gc
import json

import lmdb
import numpy as np
import pytest
import torch
from commands import command

from causvid.data import digest, latents, order
from causvid.data import pack as packing
from causvid.data.encode import to_file
from causvid.data.folders import Folder
from causvid.data.lmdb_store import Reader, Writer
from causvid.data.rows import Row, check_header
from causvid.errors import UserError

FIELDS = {"latents": {"dtype": "float16", "shape": [None, 4, 8, 8]}}
RECIPE = {
    "step": "encode", "codec": {"name": "x"}, "text_encoder": {"name": "y"}, "text_length": 6, "text_dim": 4,
    "unconditional": [[0.5, 0, 1, 2]],
}  # fmt: skip


def row(number):
    array = np.random.default_rng(number).standard_normal((2, 4, 8, 8)).astype(np.float16)
    return Row(f"r{number:03d}", {"latents": array}, {"caption": f"clip {number}"})


@pytest.fixture
def store(tmp_path):
    """A finished store of seven rows."""
    with Writer(tmp_path / "s", {"fields": FIELDS}) as writer:
        writer.add([row(number) for number in range(7)])
    digest.finish(tmp_path / "s")
    gc.collect()
    return tmp_path / "s"


@pytest.fixture
def cheap(monkeypatch):
    """The survey in this process: what a crash would do is another test's."""
    monkeypatch.setattr(packing, "sound", lambda path: packing.survey(str(path)))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock.mdb"}  # fmt: skip


def change(store, find, put):
    """Change bytes of a store that stand in it once."""
    path = store / "data.mdb"
    whole = path.read_bytes()
    assert whole.count(find) == 1 and len(find) == len(put)
    path.write_bytes(whole.replace(find, put))


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        (None, "is not finished: it has no digest.json"), (b'{"digest": 1}', "is damaged"),
        (b'{"digest": "0", "files": {}, "rows": 7}', "holds 7 rows that are not the 7"),
    ],
)  # fmt: skip
def test_a_store_that_is_not_finished_is_no_source(mark, reason, store, tmp_path, capsys):
    (store / digest.NAME).unlink() if mark is None else (store / digest.NAME).write_bytes(mark)
    for verb, target in (("pack", [tmp_path / "out"]), ("verify", [])):
        status, counts, err = command(capsys, verb, store, *target)
        assert status == 2 and not counts and err.count("error: ") == 1
        assert reason in err
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_not_finished_is_trained_on_by_nobody(store):
    assert latents.StoreDataset(str(store), (2, 4, 8, 8)).latents([0])[0].shape == (1, 2, 4, 8, 8)
    gc.collect()
    (store / digest.NAME).unlink()
    with pytest.raises(UserError, match="world.dataset: .* is not finished.*run 'causvid data pack' again"):
        latents.StoreDataset(str(store), (2, 4, 8, 8)).latents([0])


@pytest.mark.usefixtures("cheap")
def test_a_store_that_lost_rows_is_no_source(store, tmp_path, capsys):
    with lmdb.open(str(store)) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"i:r003")
    for verb, target in (("pack", [tmp_path / "out"]), ("verify", [])):
        status, _, err = command(capsys, verb, store, *target)
        assert status == 2 and "holds 6 rows that are not the 7" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("harm", ["checksum", "entry"])
def test_damage_of_one_index_entry_costs_its_row(harm, store, tmp_path, capsys):
    entry = Reader(store).entries["r003"]
    find, put = {
        "checksum": (entry.checksum, bytes([entry.checksum[0] ^ 1]) + entry.checksum[1:]),
        "entry": (entry.text, b"[" + entry.text[1:]),
    }[harm]
    gc.collect()
    change(store, find, put)
    status, counts, _ = command(capsys, "verify", store)
    assert (status, counts["given"], counts["done"]) == (3, 7, 6)
    assert [row["clip"] for row in counts["quarantine"]] == ["r003"]
    if harm == "entry":
        with pytest.raises(UserError, match="'r003': its index entry is damaged"):
            Reader(store)  # what trains leaves no row out
    status, counts, _ = command(capsys, "pack", store, tmp_path / "out")
    assert (status, counts["done"], counts["quarantined"]) == (3, 6, 1)
    assert list(Reader(tmp_path / "out").entries) == [f"r{number:03d}" for number in range(7) if number != 3]


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_an_output_that_is_or_lies_in_the_store_is_refused(verb, store, tmp_path, capsys):
    (store / "quarantine.jsonl").write_text('{"clip": "a.mp4", "reason": "told by pack"}\n')
    (tmp_path / "link").symlink_to(store)
    before = content(store)
    for target in (f"{store}/", tmp_path / "link") if verb == "verify" else (store, store / "inside"):
        status, _, err = command(capsys, verb, store, target)
        assert status == 2 and ("same place" in err or "lies inside" in err)
    assert content(store) == before


def encoded(folder, **changes):
    """Latents of two clips, and a recipe that is damaged."""
    place = Folder(str(folder))
    place.write("recipe.json", json.dumps({**RECIPE, **changes}).encode())
    for name in "ab":
        arrays = {"latents": np.ones((2, 4, 8, 8), np.float16), "text": np.ones((2, 4), np.float32)}
        place.write(f"latents/{name}.safetensors", to_file(Row(name, arrays, {"caption": "x"})))
    return folder


DAMAGE = [
    {"unconditional": [[float("nan"), 0, 0, 0]]}, {"unconditional": [[0, 0, 0]]}, {"unconditional": "x"},
    {"unconditional": [["0", 0, 0, 0]]}, {"unconditional": [[0] * 4] * 7}, {"unconditional": [5]},
    {"unconditional": [[10**400, 0, 0, 0]]}, {"codec": "x"}, {"codec": ["x"]}, {"text_encoder": 3},
    {"text_length": "x"}, {"text_length": 0}, {"text_length": None}, {"text_length": 2.5}, {"text_length": True},
    {"text_dim": "x"}, {"text_dim": -4}, {"text_dim": float("inf")},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_recipe_is_one_error_and_nothing_is_written(damage, tmp_path):
    source = encoded(tmp_path / "latents", **damage)
    with pytest.raises(UserError, match="recipe.json is damaged .*encode again"):  # one error and exit status 2
        packing.pack(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_whole_is_packed(tmp_path, capsys):
    assert command(capsys, "pack", encoded(tmp_path / "latents"), tmp_path / "out")[:1] == (0,)
    free = latents.unconditional(Reader(tmp_path / "out").header)
    assert free is not None and free.shape == (6, 4) and free[0].tolist() == [0.5, 0, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        *({**RECIPE, **each} for each in DAMAGE), {"times": "x"}, {"times": [1, float("nan")]}, {"times": ["1"]},
        {"fields": {"latents": {"dtype": "complex64", "shape": [1]}}}, {"fields": {"latents": {"dtype": "float16"}}},
        {"fields": {"latents": {"dtype": "float16", "shape": [0]}}}, {"fields": []}, {"unconditional": [[0]]},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_no_reader_could_use_is_neither_written_nor_read(wrong, tmp_path):
    header = {"format": "causvid-store", "version": 1, "fields": FIELDS, **wrong}
    with pytest.raises((ValueError, KeyError)):
        check_header(header)
    with pytest.raises((ValueError, KeyError)):
        Writer(tmp_path / "written", header)
    assert not (tmp_path / "written").exists()
    with lmdb.open(str(tmp_path / "s")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"header", json.dumps(header).encode())
    with pytest.raises(UserError, match="its header is damaged"):
        Reader(tmp_path / "s")


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize(("told", "fewer"), [(b"100 2 4 8 8", True), (b"3 2 4 8 8", False)])
def test_fewer_released_rows_than_the_shape_says_are_told(told, fewer, tmp_path, capsys):
    with lmdb.open(str(tmp_path / "old")) as environment, environment.begin(write=True) as write:
        write.put(b"latents_shape", told)
        for number in range(5):
            write.put(f"latents_{number}_data".encode(), row(number).arrays["latents"].tobytes())
            write.put(f"prompts_{number}_data".encode(), b"a cat")
    status, counts, err = command(capsys, "pack", tmp_path / "old", tmp_path / "new")
    assert (status, counts["given"], counts["done"]) == (0, 5, 5)
    assert ("latents_shape says 100 rows, and 5 are there" in err) is fewer and ("latents_shape" in err) is fewer


def test_a_rank_reads_its_own_rows(store):
    """Each rank of two, against the order that says which rows are whose."""
    buckets = latents.by_shape(Reader(store))
    seen = []
    for rank in range(2):
        wanted = order.Order(buckets, 2, 5, rank, 2)
        batches = list(latents.load(str(store), 2, start=1, seed=5, rank=rank, world=2, stop=6))
        told = [[f"clip {int(key[1:])}" for key in wanted.step(step)] for step in range(1, 6)]
        assert [captions for _, captions, _ in batches] == told
        seen.append(told)
    assert seen[0] != seen[1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_that_read_ahead_change_no_batch(workers, store):
    place = {"start": 1, "seed": 3, "rank": 1, "world": 2, "stop": 4}
    wanted, found = (list(latents.load(str(store), 2, **place, workers=number)) for number in (0, workers))
    assert len(wanted) == 3 and [captions for _, captions, _ in wanted] == [captions for _, captions, _ in found]
    assert all(torch.equal(a, b) for (a, _, _), (b, _, _) in zip(wanted, found, strict=True))
