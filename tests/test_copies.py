"""Copies of remote stores: of what is there now, in bounded room, and nothing else of the cache's folder is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import Any

import fsspec
import numpy as np
import pytest
from commands import command
from fsspec.implementations.memory import MemoryFileSystem

from causvid.data import copies, digest, pack
from causvid.data.copies import cached
from causvid.data.folders import Folder, marks
from causvid.data.lmdb_store import Reader, Writer
from causvid.data.manifest import Clip, Given
from causvid.data.rows import Row
from causvid.data.sources import origin
from causvid.errors import UserError

FIELDS = {"latents": {"dtype": "float16", "shape": [2, 4, 8, 8]}}


class Silent(MemoryFileSystem):
    """Tells names and sizes of files, and nothing else."""

    protocol = "silent"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix(f"{cls.protocol}:/"))

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **more):
        found: Any = super().find(path, maxdepth, withdirs, detail=True, **more)
        return {name: {**facts, "created": None} for name, facts in found.items()} if detail else list(found)

    def info(self, path, **more):
        return {**super().info(path, **more), "created": None}

    def modified(self, path):
        raise NotImplementedError


class Tagged(Silent):
    """Tells a tag when asked of a single file, as a web server does."""

    protocol = "tagged"
    store, pseudo_dirs = {}, [""]

    def info(self, path, **more):
        found, stored = super().info(path, **more), self.store.get(self._strip_protocol(path))
        return {**found, "ETag": stored and hashlib.sha256(stored.getvalue()).hexdigest()}


class Dated(Silent):
    """Tells when a file was changed, when asked for that."""

    protocol = "dated"
    store, pseudo_dirs = {}, [""]

    def modified(self, path):
        return MemoryFileSystem.modified(self, path)


for each in (Silent, Tagged, Dated):
    fsspec.register_implementation(each.protocol, each, clobber=True)
KINDS = ("memory", "silent", "tagged", "dated")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSVID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetches(monkeypatch):
    """The names of all files that are fetched."""
    names, get_file = [], MemoryFileSystem.get_file

    def count(self, source, target, **more):
        names.append(source.rpartition("/")[2])
        get_file(self, source, target, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", count)
    return names


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_touches_nothing_else_in_the_folder_of_the_cache(cache, tmp_path, monkeypatch):
    """Hidden folders of a user, names much like a copy's, and copies of a folder that isn't ours."""
    monkeypatch.setenv("CAUSVID_CACHE_GB", "0.000001")
    names = [".ssh", ".config/deep", f".{'a' * 24}", "b" * 24, f"remote-stores/.{'x' * 24}", "remote-stores/.ssh",
             "remote-stores/mine", f"remote-stores/{'c' * 23}"]  # fmt: skip
    for name in names:
        (cache / name).mkdir(parents=True)
        (cache / name / "precious").write_bytes(bytes(2000))
        (cache / name / ".complete").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".complete").write_text("")
    (cache / "remote-stores" / ("d" * 24)).symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path)
    killed = cache / "remote-stores" / f".{'e' * 24}"  # as a killed fetch leaves it
    killed.mkdir()
    for name in "ab":
        Folder(f"memory://beside/{name}").write("data", bytes(900))
        cached(f"memory://beside/{name}")
    assert not killed.exists()
    after = content(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert not list(cache.glob("*.lock")) and {path.name for path in cache.iterdir()} == {
        ".ssh", ".config", f".{'a' * 24}", "b" * 24, "remote-stores"
    }  # fmt: skip
    assert sum(path.name == "data" for path in cache.rglob("data")) == 1  # the other made room


def test_copies_are_kept_and_bounded(monkeypatch):
    monkeypatch.setenv("CAUSVID_CACHE_GB", "0.0000035")
    for name in "abcd":
        Folder(f"memory://cached/{name}").write("data", name.encode() * 1000)
    places = [cached(f"memory://cached/{name}") for name in "abc"]
    assert [(place / "data").read_bytes()[:1] for place in places] == [b"a", b"b", b"c"]
    assert cached("memory://cached/a") == places[0]
    cached("memory://cached/d")
    assert (places[0] / "data").exists() and not (places[1] / "data").exists()  # the one unused for longest
    Folder("memory://cached/big").write("data", b"x" * 4000)
    with pytest.raises(UserError, match="CAUSVID_CACHE_GB"):
        cached("memory://cached/big")


def test_a_limit_that_is_no_number_is_one_error(monkeypatch):
    Folder("memory://limited").write("data.mdb", b"x")
    for wrong in ("lots", "nan", "-1"):
        monkeypatch.setenv("CAUSVID_CACHE_GB", wrong)
        with pytest.raises(UserError, match=f"CAUSVID_CACHE_GB: expected a number.*{wrong}"):
            cached("memory://limited")


@pytest.mark.parametrize("kind", KINDS)
def test_another_file_of_the_same_size_is_fetched_and_the_same_is_not(kind, fetches):
    folder = Folder(f"{kind}://same-size")
    for name in ("data.mdb", "digest.json"):
        folder.write(name, b"one")
    first = cached(folder.uri)
    assert cached(folder.uri) == first and len(fetches) == (4 if kind == "silent" else 2)
    folder.write("data.mdb", b"two")
    second = cached(folder.uri)
    assert (second / "data.mdb").read_bytes() == b"two" and (first / "data.mdb").read_bytes() == b"one"
    assert len(fetches) == (6 if kind == "silent" else 4)
    assert (cached(folder.uri, anew=True) / "data.mdb").read_bytes() == b"two"
    assert len(fetches) == (8 if kind == "silent" else 6)


def test_a_file_that_is_changed_in_its_place_is_fetched():
    """Its time of making stays, and that of its change does not."""
    folder = Folder("memory://in-place")
    folder.write("data", b"one")
    cached(folder.uri)
    with folder.fs.open(folder.join("data"), "r+b") as stream:
        stream.write(b"two")
    folder.fs.store[folder.join("data")].modified = folder.fs.store[folder.join("data")].modified.replace(year=2000)
    assert (cached(folder.uri) / "data").read_bytes() == b"two"


def test_a_store_that_changes_while_it_is_fetched_is_no_copy(monkeypatch, cache):
    folder, get_file = Folder("memory://changing"), MemoryFileSystem.get_file
    folder.write("data", b"one")

    def late(self, source, target, **more):
        folder.write("data", b"two")
        get_file(self, source, target, **more)

    with monkeypatch.context() as during, pytest.raises(UserError, match="changed while it was fetched"):
        during.setattr(MemoryFileSystem, "get_file", late)
        cached(folder.uri)
    assert not list(cache.rglob(copies.WHOLE)) and (cached(folder.uri) / "data").read_bytes() == b"two"


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    folder = Folder("silent://names")
    folder.fs.store[f"/names/{tmp_path}/owned"] = folder.fs.open("/other", "wb")
    assert list(folder.sizes()) == [f"{tmp_path}/owned"]
    with pytest.raises(UserError, match="a name that no folder here can have"):
        cached(folder.uri)
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def cheap(monkeypatch):
    """The survey in this process: what a crash would do is another test's."""
    monkeypatch.setattr(pack, "sound", lambda path: pack.survey(str(path)))


def remote_store(tmp_path, uri, caption):
    """A whole store of three rows at an address."""
    folder = tmp_path / "made"
    with Writer(folder, {"fields": FIELDS}) as writer:
        for number in range(3):
            latents = np.random.default_rng(number).standard_normal((2, 4, 8, 8)).astype(np.float16)
            writer.add([Row(f"r{number}", {"latents": latents}, {"caption": caption})])
    digest.finish(folder)
    place = Folder(uri)
    for name in ("data.mdb", "digest.json"):
        place.write(name, (folder / name).read_bytes())
    shutil.rmtree(folder)
    return place


@pytest.mark.usefixtures("cheap")
def test_pack_takes_what_is_there_now(tmp_path, capsys):
    remote_store(tmp_path, "memory://rewritten", "a cat")
    assert command(capsys, "pack", "memory://rewritten", tmp_path / "first")[0] == 0
    remote_store(tmp_path, "memory://rewritten", "a dog")
    assert command(capsys, "pack", "memory://rewritten", tmp_path / "second")[0] == 0
    told = [{e.facts["caption"] for e in Reader(tmp_path / name).entries.values()} for name in ("first", "second")]
    assert told == [{"a cat"}, {"a dog"}]


@pytest.mark.usefixtures("cheap")
def test_verify_checks_what_is_there_and_not_its_copy(tmp_path, capsys):
    """Damage that leaves size, tag and times as they were, as that of a disk does."""
    place = remote_store(tmp_path, "memory://rotten", "a cat")
    assert command(capsys, "verify", place)[1]["done"] == 3
    stored = place.fs.store[place.join("data.mdb")]
    row = Reader(cached(place.uri)).row("r1").arrays["latents"].tobytes()
    stored.getbuffer()[stored.getvalue().find(row) + 8] ^= 1
    status, counts, _ = command(capsys, "verify", place)
    assert (status, counts["done"], counts["quarantined"]) == (3, 2, 1)
    assert "r1" in json.dumps(counts["quarantine"])


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ({"ETag": '"a"', "LastModified": 1, "size": 2, "type": "file"}, {"etag": '"a"'}),  # s3
        (
            {"etag": "CI=", "md5Hash": "x==", "generation": 7, "updated": "now"},
            {"etag", "md5hash", "generation"},
        ),  # gs
        ({"blob_id": "4fa", "lfs": {"sha256": "e3"}, "last_commit": None}, {"blobid": "4fa"}),  # hf
        ({"etag": "0x8", "last_modified": 1}, {"etag": "0x8"}),  # az
        ({"ETag": None, "Last-Modified": "Thu", "mimetype": "x"}, {"lastmodified": "Thu"}),  # http
        ({"mtime": 17, "time": 18, "uid": 0}, {"mtime": "17"}),  # sftp
        ({"created": 5, "name": "a", "size": 3}, {"created": "5"}),  # memory
        ({"name": "a", "size": 3, "type": "file"}, {}),
    ],
)
def test_what_filesystems_tell_of_a_file(listed, told):
    assert marks(listed) == told if isinstance(told, dict) else marks(listed).keys() == told


@pytest.mark.parametrize("kind", ["memory", "tagged"])
def test_the_source_of_a_clip_is_known_by_the_same(kind):
    folder = Folder(f"{kind}://source")
    given, found = Given(folder), []
    for content in (b"one", b"two"):
        folder.write("a.mp4", content)
        found.append(origin(given, Clip("a", "a.mp4")))
    assert found[0] != found[1] == origin(given, Clip("a", "a.mp4")) and found[0]["size"] == "3"


@pytest.mark.slow
def test_an_object_store_tells_one_state_from_another(bucket):
    folder = Folder(f"{bucket}/store")
    folder.write("shard-0/data.mdb", b"one")
    first = cached(folder.uri)
    assert cached(folder.uri) == first
    folder.write("shard-0/data.mdb", b"two")
    second = cached(folder.uri)
    assert second != first and (second / "shard-0" / "data.mdb").read_bytes() == b"two"
    folder.write("shard-0/data.mdb", b"one")
    assert cached(folder.uri) == first  # its tag is that of its content
