"""``causvid weights``: what is needed, what is there and whole, and nothing fetched unasked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from causvid import cli, wan_weights
from causvid.wan_weights import FOLDERS


def run(capsys, *arguments):
    """(status, last line of stdout, stderr)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["weights", *map(str, arguments)])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out.strip().split("\n")[-1], " ".join(err.split())


@pytest.fixture
def small(monkeypatch):
    """The same files with contents of a few bytes, by name: their own paths."""
    source, files = FOLDERS["wan_1_3b"]
    known = [
        replace(f, size=len(f.path), sha256=hashlib.sha256(f.path.encode()).hexdigest()) if f.size else f for f in files
    ]
    monkeypatch.setitem(FOLDERS, "wan_1_3b", (source, tuple(known)))
    return tuple(known)


def fill(folder, files):
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(file.path.encode())


@pytest.mark.parametrize(
    ("name", "folder"),
    [("wan/causal", "wan_1_3b"), ("wan/causal_dmd", "wan_1_3b"), ("wan/teacher_14b", "wan_14b"), ("causvid",) * 2],
)
def test_files_are_listed_and_missing_ones_told_without_fetching(name, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wan_weights, "fetch", lambda *_: pytest.fail("fetched unasked"))
    code, last, err = run(capsys, name, "--weights", tmp_path, "--json")
    rows = json.loads(last)
    assert code == 3 and [row["file"] for row in rows] == [file.path for file in FOLDERS[folder][1]]
    assert {row["state"] for row in rows} == {"missing"} and f"{len(rows)} missing" in err
    assert all(str(tmp_path / row["file"]) in err and row["licence"] in err for row in rows)
    assert ("give a student's weights with --model" in err) == (name in ("wan/causal", "wan/causal_dmd"))


def test_digests_are_whole_and_the_sizes_add_up_to_those_published():
    for _, files in FOLDERS.values():
        assert all(file.sha256 is None or (len(file.sha256) == 64 and file.size) for file in files)
        digests = [file.sha256 for file in files if file.sha256]
        assert len(set(digests)) == len(digests)
    assert sum(file.size or 0 for file in FOLDERS["wan_1_3b"][1]) == 17_567_055_052
    # The parameters of the shards in fp32, and headers of less than 0.1 MB.
    held = sum(file.size or 0 for file in FOLDERS["wan_14b"][1] if "-of-00006" in file.path)
    assert 0 <= held - 4 * 14_288_491_584 < 200_000


def test_fetching_takes_what_is_missing_or_not_whole_from_any_place(small, tmp_path, capsys):
    fill(tmp_path / "there", small)
    here = tmp_path / "here"
    here.mkdir()
    (here / "config.json").write_text("too short")
    code, _, err = run(capsys, "wan/causal", "--weights", here)
    assert code == 3 and f"WRONG SIZE {here / 'config.json'}" in err
    code, last, _ = run(capsys, "wan/causal", "--weights", here, "--fetch", "--from", f"file://{tmp_path / 'there'}/")
    assert code == 0 and last == str(here)
    assert (here / "google/umt5-xxl/spiece.model").read_bytes() == b"google/umt5-xxl/spiece.model"
    assert (here / "config.json").read_bytes() == b"config.json" and not list(here.rglob("*.partial"))


def test_another_file_of_the_same_size_is_told_when_asked_and_never_fetched(small, tmp_path, capsys):
    fill(tmp_path, small)
    (tmp_path / "config.json").write_bytes(b"config.jsoN")
    assert run(capsys, "wan/causal", "--weights", tmp_path)[0] == 0
    code, _, err = run(capsys, "wan/causal", "--weights", tmp_path, "--verify")
    assert code == 3 and f"WRONG DIGEST {tmp_path / 'config.json'}" in err
    code, _, err = run(capsys, "wan/causal", "--weights", tmp_path / "new", "--fetch", "--from", f"file://{tmp_path}")
    assert code == 2 and "wrong digest: it is not the published file" in err
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


def test_what_can_t_be_fetched_is_one_error_and_leaves_nothing(tmp_path, capsys):
    code, _, err = run(capsys, "wan/causal", "--weights", tmp_path, "--fetch", "--from", f"file://{tmp_path}/nowhere")
    assert code == 2 and "can't be fetched" in err and f"put it at {tmp_path / 'config.json'}" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"\xef\xbb\xbf<html>", b"", b"x" * 4000])
def test_a_file_of_unknown_size_must_read_as_weights(content, tmp_path, capsys):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "taew2_1.pth").write_bytes(content)
    fetching = ["preview", "--weights", tmp_path / "to", "--fetch", "--from", f"file://{tmp_path / 'from'}"]
    code, _, err = run(capsys, *fetching)
    assert code == 2 and "unreadable: it is not the published file" in err and not list((tmp_path / "to").iterdir())
    code, _, err = run(capsys, "preview", "--weights", tmp_path / "from")
    assert code == 3 and f"UNREADABLE {tmp_path / 'from' / 'taew2_1.pth'}" in err
    torch.save({"decoder.1.weight": torch.ones(2)}, tmp_path / "from" / "taew2_1.pth")
    assert run(capsys, *fetching)[0] == 0 and (tmp_path / "to" / "taew2_1.pth").is_file()


def test_addresses_for_a_browser_are_told(tmp_path, capsys):
    _, _, err = run(capsys, "wan/causal", "--weights", tmp_path)
    assert "download them from https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B on a machine" in err and "hf://" not in err
    _, _, err = run(capsys, "preview", "--weights", tmp_path)
    assert "download them from https://github.com/madebyollin/taehv/raw/main/taew2_1.pth on a machine" in err
    code, _, err = run(capsys, "wan/causal", "--weights", tmp_path, "--fetch", "--from", f"file://{tmp_path}/nowhere")
    assert code == 2 and "(from https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B/resolve/main/config.json)" in err


def test_a_spec_of_another_world_is_refused(tmp_path, capsys):
    code, _, err = run(capsys, "tiny/causvid", "--weights", tmp_path)
    assert code == 2 and "of no released size; accepted: a spec under wan/" in err
