"""The store: what makes a result new, what counts as finished, and two processes at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from causvid import checkpoint, runs, weights
from causvid.errors import UserError
from causvid.spec import Spec

PACKAGE = Path(runs.__file__).parent


class Toy:
    """Writes a line; slow on request."""

    name = "toy"

    def __init__(self, pause=0.0, fail=False):
        self.pause, self.fail = pause, fail

    def reads(self, spec):
        return ("a",)

    def inputs(self, spec):
        return ()

    def outside(self, spec):
        return tuple(Path(p) for p in spec["files"])

    def run(self, context):
        with (context.folder / "log").open("a") as stream:
            stream.write("ran\n")
        time.sleep(self.pause)
        if self.fail:
            raise RuntimeError("half way")


def node_of(data, stage=None):
    return runs.graph(Spec("x", {"files": [], **data}), {"toy": stage or Toy()}, "toy")[0]


def test_an_identity_is_what_is_read_and_nothing_else(tmp_path):
    one = node_of({"a": 1, "b": 2}).identity
    assert one == node_of({"a": 1, "b": 3}).identity
    assert one != node_of({"a": 2, "b": 2}).identity
    (tmp_path / "w").write_text("1")
    first = node_of({"a": 1, "files": [str(tmp_path / "w")]}).identity
    (tmp_path / "w").write_text("2")
    assert first != node_of({"a": 1, "files": [str(tmp_path / "w")]}).identity


def test_a_failed_stage_is_not_finished_and_runs_again(tmp_path):
    store = runs.Store(tmp_path)
    node = node_of({"a": 1}, Toy(fail=True))
    with pytest.raises(UserError, match="toy could not go on: half way"):
        store.execute([node], Spec("x", {}), print)
    assert "RuntimeError: half way" in (store.folder(node) / "error.txt").read_text()
    assert not store.done(node) and "would continue" in store.explain(node)
    assert store.execute([node_of({"a": 1})], Spec("x", {}), print) == (["toy"], [])
    assert not (store.folder(node) / "error.txt").exists()
    assert store.done(node) and store.execute([node], Spec("x", {}), print) == ([], ["toy"])


def test_a_stage_of_which_a_file_was_deleted_runs_again(tmp_path):
    store, node = runs.Store(tmp_path), node_of({"a": 1})
    store.execute([node], Spec("x", {}), print)
    (store.folder(node) / "log").unlink()
    assert not store.done(node) and store.explain(node) == "would run: of what it made, 'log' is gone"
    with pytest.raises(UserError, match="half way"):  # and is not taken for finished on the way
        store.execute([node_of({"a": 1}, Toy(fail=True))], Spec("x", {}), print)
    assert (store.folder(node) / "log").exists() and not store.done(node)
    assert store.execute([node], Spec("x", {}), print) == (["toy"], [])
    assert store.done(node) and store.explain(node) == "done"


def test_explain_names_what_changed_and_survives_damage(tmp_path):
    store = runs.Store(tmp_path)
    node = node_of({"a": {"b": 1}})
    assert store.explain(node) == "never run"
    store.execute([node], Spec("x", {}), print)
    assert store.explain(node_of({"a": {"b": 2}})) == "would run: a.b: 1 -> 2"
    (store.folder(node) / "record.json").write_text("{half")
    assert store.explain(node_of({"a": {"b": 2}})) == "never run"


def _work(root):
    store = runs.Store(Path(root))
    executed, _ = store.execute([node_of({"a": 1}, Toy(pause=1.0))], Spec("x", {}), lambda text: None)
    os._exit(len(executed))


def test_two_processes_do_the_work_once(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_work, args=(str(tmp_path),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert sorted(process.exitcode for process in both) == [0, 1]
    assert next(tmp_path.glob("toy/*/log")).read_text() == "ran\n"


def identities(root):
    """Identity of each stage as a copy of the package at ``root`` sees it."""
    found = subprocess.run(
        [sys.executable, "-m", "causvid.cli", "plan", "tiny/from_scratch", "--json", "--runs", str(root / "runs")],
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {row["stage"]: row["identity"] for row in json.loads(found.stdout)}


def test_a_comment_in_a_loss_changes_nothing_and_its_arithmetic_runs_distillation_again(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "causvid", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "experiments", tmp_path / "experiments")
    loss = tmp_path / "causvid" / "losses" / "dmd.py"
    before = identities(tmp_path)
    source = loss.read_text()
    loss.write_text(source.replace('"""Distribution', '"""Changed words. Distribution') + "\n# a comment\n")
    assert identities(tmp_path) == before
    loss.write_text(source.replace("0.5 * (sample.x0", "0.6 * (sample.x0"))
    after = identities(tmp_path)
    changed = {stage for stage in before if before[stage] != after[stage]}
    assert changed == {"distill", "sample", "evaluate", "report"}


def test_a_checkpoint_comes_back_exactly(tmp_path):
    tree = {"a": {"b": torch.randn(3), 1: [1, 2.5, None, "x", torch.arange(3)]}, "c": {"empty": {}, "t": (True,)}}
    checkpoint.save(tmp_path / "c.safetensors", tree)
    back = checkpoint.load(tmp_path / "c.safetensors")
    assert torch.equal(back["a"]["b"], tree["a"]["b"]) and torch.equal(back["a"][1][4], torch.arange(3))
    assert back["a"][1][:4] == [1, 2.5, None, "x"] and back["c"] == {"empty": {}, "t": [True]}


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"\x80\x04}q\x00.", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"]
)
def test_damaged_weights_give_one_clear_error(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        weights.read_tensors(tmp_path / "w.safetensors")


def test_a_missing_file_of_weights_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        weights.read_tensors(tmp_path / "none.safetensors")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    weights.write_json(path, {"a": float("nan"), "b": [1]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1]}
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        weights.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": None, "b": [1]}


class Half(Toy):
    """Leaves a checkpoint, as a training stage does."""

    def run(self, context):
        context.checkpoint.write_text("state")
        super().run(context)


def test_a_checkpoint_stays_until_the_stage_is_done(tmp_path, monkeypatch):
    store, node, said = runs.Store(tmp_path), node_of({"a": 1}, Half()), []
    write = weights.write_json
    kept = []

    def watched(path, value):
        if path.name == "DONE":
            kept.append((path.parent / "checkpoint.safetensors").is_file())
        write(path, value)

    monkeypatch.setattr(weights, "write_json", watched)
    store.execute([node], Spec("x", {}), said.append)
    assert kept == [True] and not (store.folder(node) / "checkpoint.safetensors").exists()
    assert said[0].startswith("toy: begins in ") and said[1].startswith("toy: done in ")


class Lacking(Toy):
    def __init__(self, error):
        self.error = error

    def run(self, context):
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'torchtune'", name="torchtune"), r"pip install 'causvid\[train\]'"),
        (ImportError("torchao not installed"), r"pip install 'causvid\[train\]'"),
        (ImportError("``wandb`` package not found"), r"pip install 'causvid\[wandb\]'"),
        (ValueError("no"), "toy could not go on: no"),
        (UserError("plain words"), "^plain words$"),
    ],
)
def test_what_a_stage_cannot_do_is_one_message(error, words, tmp_path):
    with pytest.raises(UserError, match=words):
        runs.Store(tmp_path).execute([node_of({"a": 1}, Lacking(error))], Spec("x", {}), lambda text: None)


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path):
    for error in (ImportError("no such thing", name="elsewhere"), TypeError("bug")):
        with pytest.raises(type(error)):
            runs.Store(tmp_path).execute([node_of({"a": 1}, Lacking(error))], Spec("x", {}), lambda text: None)


def test_the_commit_is_ours_or_none(tmp_path, monkeypatch):
    """An installed package inside a repository of its user's does not record that one's commit."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(tmp_path), *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "causvid" / "runs.py"))
    for content, ours in [(None, False), ('name = "theirs"', False), ('name = "causvid"', True)]:
        if content:
            (tmp_path / "pyproject.toml").write_text(content)
        runs._commit.cache_clear()
        assert (runs._commit() is not None) is ours
    runs._commit.cache_clear()
