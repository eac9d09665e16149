"""``causvid weights``: what is needed, what is there, and nothing fetched unasked."""

from __future__ import annotations

import json

import pytest

from causvid import cli, wan_weights
from causvid.wan_weights import FOLDERS


def run(capsys, *arguments):
    """(status, last line of stdout, stderr)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["weights", *map(str, arguments)])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out.strip().split("\n")[-1], " ".join(err.split())


@pytest.mark.parametrize(
    ("name", "folder"), [("wan/causal", "wan_1_3b"), ("wan/teacher_14b", "wan_14b"), ("causvid", "causvid")]
)
def test_files_are_listed_and_missing_ones_told_without_fetching(name, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wan_weights, "fetch", lambda *_: pytest.fail("fetched unasked"))
    code, last, err = run(capsys, name, "--weights", tmp_path, "--json")
    rows = json.loads(last)
    assert code == 3 and [row["file"] for row in rows] == [file.path for file in FOLDERS[folder][1]]
    assert not any(row["there"] for row in rows) and f"{len(rows)} missing" in err
    assert all(str(tmp_path / row["file"]) in err and row["licence"] in err for row in rows)


def test_fetching_takes_what_is_missing_from_any_place(tmp_path, capsys):
    there = tmp_path / "there"
    for file in FOLDERS["wan_1_3b"][1]:
        (there / file.path).parent.mkdir(parents=True, exist_ok=True)
        (there / file.path).write_bytes(file.path.encode())
    here = tmp_path / "here"
    here.mkdir()
    (here / "config.json").write_text("mine")
    code, last, _ = run(capsys, "wan/causal", "--weights", here, "--fetch", "--from", f"file://{there}/")
    assert code == 0 and last == str(here)
    assert (here / "config.json").read_text() == "mine"
    assert (here / "google/umt5-xxl/spiece.model").read_bytes() == b"google/umt5-xxl/spiece.model"
    assert not list(here.rglob("*.partial"))


def test_what_can_t_be_fetched_is_one_error_and_leaves_nothing(tmp_path, capsys):
    code, _, err = run(capsys, "wan/causal", "--weights", tmp_path, "--fetch", "--from", f"file://{tmp_path}/nowhere")
    assert code == 2 and "can't be fetched" in err and f"put it at {tmp_path / 'config.json'}" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_spec_of_another_world_is_refused(tmp_path, capsys):
    code, _, err = run(capsys, "tiny/causvid", "--weights", tmp_path)
    assert code == 2 and "of no released size; accepted: a spec under wan/" in err
