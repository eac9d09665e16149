"""Weights and checkpoints on disk: what is written comes back, and what is damaged is told."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causvid import checkpoint, weights
from causvid.errors import UserError

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_with_type_shape_and_metadata(dtype, tmp_path):
    tensors = {
        "a.b": torch.randn(2, 3).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "one": torch.ones(()).to(dtype),
    }
    weights.write_tensors(tmp_path / "new" / "w.safetensors", tensors, {"k": "v"})
    back, metadata = weights.read_tensors(tmp_path / "new" / "w.safetensors")
    assert metadata == {"k": "v"} and back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == dtype


def test_views_and_parameters_are_written_as_they_look(tmp_path):
    base = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    weights.write_tensors(tmp_path / "w", {"turned": base.T, "row": base[1], "strided": base[:, ::2]})
    back, _ = weights.read_tensors(tmp_path / "w")
    assert torch.equal(back["turned"], base.T) and torch.equal(back["row"], base[1])
    assert torch.equal(back["strided"], base[:, ::2]) and not back["row"].requires_grad


def test_equal_content_is_equal_bytes(tmp_path):
    one, two = torch.ones(2), torch.zeros(3)
    weights.write_tensors(tmp_path / "a", {"x": one, "y": two})
    weights.write_tensors(tmp_path / "b", {"y": two, "x": one})
    assert weights.digest(tmp_path / "a") == weights.digest(tmp_path / "b")
    assert weights.digest(tmp_path / "a") == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_a_file_cut_anywhere_is_one_error(tmp_path):
    weights.write_tensors(tmp_path / "w", {"a": torch.randn(4), "b": torch.randn(2, 2)})
    content = (tmp_path / "w").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            weights.read_tensors(tmp_path / "cut")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", pickle.dumps({"a": 1}), b"PK\x03\x04", b"\xff" * 64])
def test_other_kinds_of_files_are_one_error(content, tmp_path):
    (tmp_path / "w").write_bytes(content)
    for read in (weights.read_tensors, checkpoint.load):
        with pytest.raises(UserError, match="not a complete safetensors file"):
            read(tmp_path / "w")


def test_a_folder_and_nothing_are_one_error(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError):
            weights.read_tensors(path)
        with pytest.raises(UserError, match="can't be read"):
            weights.digest(path)


def test_weights_without_a_tree_are_no_checkpoint(tmp_path):
    weights.write_tensors(tmp_path / "w", {"a": torch.ones(1)})
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "w")


def test_nothing_partial_stays_behind_and_the_old_file_survives(tmp_path, monkeypatch):
    weights.write_bytes(tmp_path / "f", b"old")
    weights.write_bytes(tmp_path / "f", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"new"
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, target: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        weights.write_bytes(tmp_path / "f", b"newer")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_json_is_sorted_and_strict(tmp_path):
    weights.write_json(tmp_path / "j", {"b": [float("inf"), (1.5,)], "a": {"x": float("nan"), "y": -float("inf")}})
    text = (tmp_path / "j").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": {"x": None, "y": None}, "b": [None, [1.5]]}
    assert text.index('"a"') < text.index('"b"') and text.endswith("\n")


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_any_tree_comes_back(tree, tmp_path):
    checkpoint.save(tmp_path / "c", {"tree": tree})
    assert checkpoint.load(tmp_path / "c") == {"tree": tree}


def test_tensors_that_share_memory_come_back_and_are_copies(tmp_path):
    shared = torch.randn(4)
    tree = {"a": shared, "b": {"c": [shared, shared[:2], torch.nn.Parameter(shared)]}, "a/b": torch.zeros(1)}
    checkpoint.save(tmp_path / "c", tree)
    back = checkpoint.load(tmp_path / "c")
    assert torch.equal(back["a"], shared) and torch.equal(back["b"]["c"][1], shared[:2])
    assert back["a"].data_ptr() != back["b"]["c"][0].data_ptr()


def test_names_with_slashes_do_not_collide(tmp_path):
    checkpoint.save(
        tmp_path / "c", {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), 1: torch.ones(2), "1": torch.ones(3)}
    )
    back = checkpoint.load(tmp_path / "c")
    assert back["a"]["b"] == 0 and back["a/b"] == 1 and len(back[1]) == 2 and len(back["1"]) == 3


def test_an_optimizer_comes_back(tmp_path):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c", optimizer.state_dict())
    fresh = torch.optim.AdamW(module.parameters(), lr=0.5)
    fresh.load_state_dict(checkpoint.load(tmp_path / "c"))
    assert fresh.param_groups[0]["lr"] == 0.1
    for parameter in module.parameters():
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_tensors_that_share_memory_come_back_too(tmp_path):
    whole = torch.arange(6.0)
    tensors = {"first": whole[:4], "last": whole[2:], "whole": whole, "again": whole}
    weights.write_tensors(tmp_path / "w.safetensors", tensors)
    back, _ = weights.read_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
