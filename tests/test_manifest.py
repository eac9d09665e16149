"""Manifests: every form, and every bad row told while the others go on."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from commands import command

from causvid.data import manifest
from causvid.data.folders import Folder
from causvid.errors import UserError


def write(folder, name, content):
    for clip in ("a.mp4", "b.mp4"):
        (folder / clip).write_bytes(b"x")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", "path,caption,start,end\na.mp4,a cat,1.5,3\nb.mp4,a dog,,\n"),
        (
            "m.jsonl",
            '{"path": "a.mp4", "caption": "a cat", "start": 1.5, "end": 3}\n\n{"url": "b.mp4", "text": "a dog"}\n',
        ),
        (
            "m.json",
            '[{"file": "a.mp4", "cap": ["a  cat "], "start": 1.5, "end": "3"}, {"video": "b.mp4", "caption": "a dog"}]',
        ),
        ("m.csv", "\ufefffile,caption,start,end\r\na.mp4,a cat,1.5,3\r\nb.mp4,a dog,,\r\n"),
    ],
)
def test_forms_of_a_manifest(tmp_path, name, content):
    given = manifest.read(write(tmp_path, name, content))
    assert [(c.path, c.caption, c.start, c.end) for c in given.clips] == [
        ("a.mp4", "a cat", 1.5, 3.0), ("b.mp4", "a dog", None, None)
    ]  # fmt: skip
    assert given.count == 2 and len({clip.id for clip in given.clips}) == 2


def test_mixkit_captions_name_files_of_subfolders(tmp_path):
    (tmp_path / "airplane").mkdir()
    (tmp_path / "airplane" / "mixkit-1.mp4").write_bytes(b"x")
    given = manifest.read(
        write(tmp_path, "captions.json", json.dumps({"mixkit-1.mp4": "a plane", "mixkit-2.mp4": "no"}))
    )
    assert [(clip.path, clip.caption) for clip in given.clips] == [
        ("airplane/mixkit-1.mp4", "a plane"), ("mixkit-2.mp4", "no")
    ]  # fmt: skip


def test_a_folder_with_captions_beside_the_clips(tmp_path):
    write(tmp_path, "a.txt", "a cat\n")
    (tmp_path / ".hidden.mp4").write_bytes(b"x")
    assert [(c.path, c.caption) for c in manifest.read(str(tmp_path)).clips] == [("a.mp4", "a cat"), ("b.mp4", "")]


def test_a_folder_that_can_not_be_looked_into_is_told(tmp_path, monkeypatch):
    """A listing leaves it out, with all that it holds."""
    write(tmp_path, "a.txt", "a cat")
    for name in ("closed", ".closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.mp4").write_bytes(b"x")
    look = os.scandir

    def scandir(path="."):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    given = manifest.read(str(tmp_path))
    assert [clip.path for clip in given.clips] == ["a.mp4", "b.mp4"]
    assert given.refused == [("closed", "can't be looked into: Permission denied")] and given.count == 3
    with pytest.raises(UserError, match="holds no clips .*can't be looked into: Permission denied"):
        manifest.read(str(tmp_path / "closed"))


def test_a_link_to_a_folder_is_put_aside_and_one_to_a_clip_is_taken(tmp_path):
    for name in ("in/a.mp4", "in/sub/b.mp4", "other/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name, target in {"link": "../other", "sub/loop": "..", ".hidden": "../other", "d.mp4": "a.mp4"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    given = manifest.read(str(tmp_path / "in"))
    assert [clip.path for clip in given.clips] == ["a.mp4", "d.mp4", "sub/b.mp4"] and given.passed_over == ()
    reason = "is a link to a folder, and those are not followed; give that folder by itself"
    assert given.refused == [("link", reason), ("sub/loop", reason)]


def test_paths_relative_to_another_folder(tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "m.csv").write_text("path,caption\na.mp4,a cat\n")
    write(tmp_path, "x.txt", "")
    given = manifest.read(str(tmp_path / "list" / "m.csv"), str(tmp_path))
    folder, name = given.place(given.clips[0])
    assert folder.read(name) == b"x"


BAD = {
    "outside": {"path": "../a.mp4"}, "deep": {"path": "x/../../a.mp4"}, "windows": {"path": "..\\a.mp4"},
    "home": {"path": "~/a.mp4"}, "nul": {"path": "a\0.mp4"}, "chain": {"path": "zip::a.mp4"}, "none": {"caption": "x"},
    "empty": {"path": ""}, "number": {"path": 5}, "caption": {"path": "a.mp4", "caption": {"a": 1}},
    "long": {"path": "a.mp4", "caption": "x" * 10_001}, "start": {"path": "a.mp4", "start": -1},
    "nan": {"path": "a.mp4", "start": "nan"}, "beyond": {"path": "a.mp4", "start": 10**400},
    "user": {"path": "~u/a.mp4"}, "order": {"path": "a.mp4", "start": 3, "end": 2},
    "true": {"path": "a.mp4", "end": True}, "id": {"path": "a.mp4", "id": "../../x"},
    "key": {"path": "a.mp4", "captoin": "a cat"},
    "hash": {"path": "a.mp4", "sha256": "xyz"}, "list": ["a.mp4"], "text": "a.mp4", "null": None,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_and_the_others_go_on(tmp_path, name):
    rows = [BAD[name], {"path": "b.mp4", "caption": "a dog"}]
    given = manifest.read(write(tmp_path, "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [clip.path for clip in given.clips] == ["b.mp4"]
    assert len(given.refused) == 1 and given.refused[0][1] and given.count == 2


@pytest.mark.parametrize("name", ["m.jsonl", "m.json"])
def test_a_number_beyond_any_costs_its_row(tmp_path, name, capsys):
    row = '{"path": "a.mp4", "caption": "x", "%s": 1' + "0" * 400 + "}"
    rows = [row % "start", row % "end", '{"path": "b.mp4", "caption": "y"}']
    source = write(tmp_path, name, "\n".join(rows) if name == "m.jsonl" else f"[{', '.join(rows)}]")
    status, counts, _ = command(capsys, "download", source, tmp_path / "out")
    assert (status, counts["done"], counts["quarantined"]) == (3, 1, 2)


def test_a_tilde_leads_out_at_the_beginning_alone(tmp_path):
    (tmp_path / "b~1.mp4").write_bytes(b"x")
    (tmp_path / "c~").mkdir()
    (tmp_path / "c~" / "~d.mp4").write_bytes(b"x")
    given = manifest.read(write(tmp_path, "m.csv", "path,caption\nb~1.mp4,a\nc~/~d.mp4,b\n~/e.mp4,c\n~e.mp4,d\n"))
    assert [clip.path for clip in given.clips] == ["b~1.mp4", "c~/~d.mp4"]
    assert [name for name, _ in given.refused] == ["row 3", "row 4"]


def test_a_checksum_in_capitals_is_the_same(tmp_path, capsys):
    digest = hashlib.sha256(b"x").hexdigest()
    rows = f"path,caption,sha256\na.mp4,a,{digest.upper()}\nb.mp4,b,{digest}\na.mp4,a,{digest}\n"
    source = write(tmp_path, "m.csv", rows)
    assert [clip.sha256 for clip in manifest.read(source).clips] == [digest] * 2
    status, counts, _ = command(capsys, "download", source, tmp_path / "out")
    assert (status, counts["done"], counts["skipped"]) == (0, 2, 1)


def test_a_row_of_a_csv_that_ends_early_is_told(tmp_path):
    given = manifest.read(write(tmp_path, "m.csv", "path,caption,start\na.mp4,a cat\nb.mp4,a dog,\n"))
    assert [clip.path for clip in given.clips] == ["b.mp4"]
    assert given.refused == [("row 1", "has fewer values than there are columns")]


def test_two_spellings_of_a_path_are_one_clip(tmp_path):
    given = manifest.read(write(tmp_path, "m.csv", "path,caption\na.mp4,a cat\n./a.mp4,a cat\n.//b.mp4,a dog\n"))
    assert [clip.path for clip in given.clips] == ["a.mp4", "b.mp4"] and given.duplicates == 1
    assert manifest.clip_of({"path": "s3://bucket//a.mp4", "caption": ""}, True).path == "s3://bucket//a.mp4"


def test_bytes_that_are_no_text_spoil_their_own_row(tmp_path):
    content = b'{"path": "a.mp4", "caption": "caf\xe9"}\n{"path": "b.mp4", "caption": "caf\xc3\xa9"}\nnot json\n'
    given = manifest.read(write(tmp_path, "m.jsonl", content))
    assert [clip.caption for clip in given.clips] == ["café"]
    assert [reason[:20] for _, reason in given.refused] == ["caption: is not UTF-", "not JSON: Expecting "]


def test_a_caption_that_is_no_text_is_told_by_its_clip(tmp_path):
    write(tmp_path, "b.txt", b"caf\xe9")
    assert manifest.read(str(tmp_path)).refused == [("b.mp4", "caption: is not UTF-8")]


def test_a_row_that_repeats_another_counts_as_a_duplicate(tmp_path):
    given = manifest.read(write(tmp_path, "m.csv", "path,caption\na.mp4,x\na.mp4,x\nb.mp4,y\n"))
    assert (len(given.clips), given.duplicates, given.count) == (2, 1, 3)


def test_a_row_with_the_id_of_another_and_other_content_is_told(tmp_path):
    rows = "path,caption,id\na.mp4,x,1\na.mp4,y,1\nb.mp4,x,1\na.mp4,x,1\n"
    given = manifest.read(write(tmp_path, "m.csv", rows))
    assert (len(given.clips), given.duplicates, given.count) == (1, 1, 4)
    assert [reason for _, reason in given.refused] == [
        "another row has its id, 1, and a different caption", "another row has its id, 1, and a different path"
    ]  # fmt: skip


def test_a_file_that_json_names_twice_counts_as_two_rows(tmp_path):
    """A mapping would keep the last caption, and tell nothing."""
    content = '{"a.mp4": "x", "b.mp4": "z", "a.mp4": "y", "b.mp4": "z"}'
    given = manifest.read(write(tmp_path, "m.json", content))
    assert [(clip.path, clip.caption) for clip in given.clips] == [("a.mp4", "x"), ("b.mp4", "z")]
    assert (len(given.refused), given.duplicates, given.count) == (1, 1, 4)
    assert given.refused[0][0] == "a.mp4" and "a different caption" in given.refused[0][1]


@pytest.mark.parametrize(("name", "form"), [("m.json", "[{},{}]"), ("m.jsonl", "{}\n{}\n")])
def test_a_row_that_has_a_key_twice_is_told(tmp_path, name, form):
    rows = '{"path": "a.mp4", "caption": "x", "caption": "y"}', '{"path": "b.mp4", "caption": "z"}'
    given = manifest.read(write(tmp_path, name, form.format(*rows)))
    assert [clip.path for clip in given.clips] == ["b.mp4"] and given.count == 2
    assert given.refused == [("row 1", "has the key 'caption' more than once")]


def test_a_manifest_from_elsewhere_names_no_files_of_this_machine():
    folder = Folder("memory://elsewhere")
    folder.write("m.jsonl", b'{"path": "/etc/hosts"}\n{"path": "file:///etc/hosts"}\n{"path": "s3://b/a.mp4"}\n')
    for root in (None, "."):
        given = manifest.read("memory://elsewhere/m.jsonl", root)
        assert [clip.path for clip in given.clips] == ["s3://b/a.mp4"] and len(given.refused) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", "{", "can't be read"), ("m.json", "3", "a list of rows"), ("m.json", "[" * 100_000, "can't be read"),
        ("m.csv", "a,b\n1,2\n", "must name the columns"), ("m.csv", "", "must name the columns"),
        ("m.csv", "path,captoin\na.mp4,x\n", "did you mean 'caption'"),
        ("m.csv", "path,caption,caption\na.mp4,x,y\n", "has the column 'caption' more than once"),
        ("m.txt", "a.mp4", "is no manifest"), ("m.csv", 'path,caption\na.mp4,"x\n', "can't be read"),
    ],
)  # fmt: skip
def test_a_manifest_that_can_not_be_read_at_all(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        manifest.read(write(tmp_path, name, content))


def test_an_unknown_key_is_told_with_the_nearest_known_one(tmp_path):
    rows = '{"path": "a.mp4", "strat": 1}\n{"path": "b.mp4", "captoin": ""}\n{"path": "a.mp4", "start": 1}\n'
    given = manifest.read(write(tmp_path, "m.jsonl", rows))
    assert [clip.start for clip in given.clips] == [1.0] and given.count == 3
    assert [reason.split(";")[0] for _, reason in given.refused] == [
        "unknown key 'strat' (did you mean 'start'?)", "unknown key 'captoin' (did you mean 'caption'?)"
    ]  # fmt: skip


def test_a_row_with_two_names_of_one_thing_is_told(tmp_path):
    """The last would be kept alone. A CSV may have both columns, if no row fills both."""
    rows = (
        '{"path": "a.mp4", "url": "b.mp4"}\n{"path": "a.mp4", "text": "x", "cap": "x"}\n{"path": "b.mp4", "url": ""}\n'
    )
    given = manifest.read(write(tmp_path, "m.jsonl", rows))
    assert [clip.path for clip in given.clips] == ["b.mp4"]
    assert [reason for _, reason in given.refused] == [
        f"has {both}, which mean the same; give one of them" for both in ("'path' and 'url'", "'text' and 'cap'")
    ]
    given = manifest.read(write(tmp_path, "m.csv", "path,url,caption\na.mp4,,x\n,b.mp4,y\na.mp4,b.mp4,z\n"))
    assert [clip.path for clip in given.clips] == ["a.mp4", "b.mp4"] and len(given.refused) == 1


@pytest.mark.parametrize(("name", "content"), [("m.jsonl", "\n"), ("m.json", "{}"), ("m.csv", "path,caption\n")])
def test_a_manifest_without_rows_is_nothing_given(tmp_path, name, content):
    with pytest.raises(UserError, match=f"nothing given: .*{name} has no rows"):
        manifest.read(write(tmp_path, name, content))


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        manifest.read(str(tmp_path / "no.csv"))
    with pytest.raises(UserError, match="holds no clips"):
        manifest.read(str(tmp_path))
    with pytest.raises(UserError, match="strange://x"):
        manifest.read("strange://x/m.csv")
