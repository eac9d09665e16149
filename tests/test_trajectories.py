"""Trajectories in a store: read as they were written, at the right times; an ODE initialisation takes any store."""

from __future__ import annotations

import lmdb
import numpy as np
import pytest
import torch
from toy import toy_spec

from causvid import experiment, runs, spec
from causvid.data import pack as packing
from causvid.data import trajectories
from causvid.data.digest import finish
from causvid.data.latents import StoreDataset
from causvid.data.lmdb_store import Reader, Writer
from causvid.data.trajectories import Trajectories
from causvid.errors import UserError
from causvid.models.text import Words
from causvid.types import Trajectory

TIMES = torch.tensor([1.0, 0.9, 0.4, 0.0])
SHAPE = (3, 2, 4, 4)
ENCODER = Words(("a", "cat", "dog"), 4, 6)
MADE_BY = {"codec": {"name": "identity"}, "text_encoder": {"name": "words"}, "provenance": {"from": "test"}}


def stored(folder, times=TIMES):
    """A store of three trajectories; returns them and their text."""
    states = torch.randn(4, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    captions = ["a cat", "a dog", ""]
    text = ENCODER.encode(captions)
    with Writer(folder, trajectories.header(times, SHAPE, text, MADE_BY)) as writer:
        writer.add(trajectories.rows_of(range(3), captions, text, Trajectory(states, times)))
    finish(folder)
    return states.half(), text


def opened(folder, wanted=(1.0, 0.4, 0.0), shape=SHAPE, expected=None):
    return Trajectories(str(folder), wanted, shape, expected or {}, "ode_init.pairs")


def test_what_was_written_is_read_at_the_wanted_times(tmp_path):
    states, text = stored(tmp_path / "s")
    found = opened(tmp_path / "s")
    assert len(found) == 3 and found.times.tolist() == pytest.approx([1.0, 0.4, 0.0])
    read, read_text = found.rows([2, 0, 2], ENCODER)
    assert torch.equal(read.states, states[[0, 2, 3]][:, [2, 0, 2]].float()) and torch.equal(read.times, found.times)
    assert torch.equal(read_text.embeddings, text.embeddings[[2, 0, 2]])
    assert packing.verify(str(tmp_path / "s"))[0].done == 3
    with pytest.raises(UserError, match="holds states, text, no latents"):
        StoreDataset(str(tmp_path / "s"), SHAPE).latents([0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wanted": (1.0, 0.5, 0.0)}, r"no state at t = 0\.5000 \(it holds 1\.0000, 0\.9000, 0\.4000, 0\.0000\)"),
        ({"shape": (3, 2, 4, 8)}, r"states of shape \[3, 2, 4, 4\]; the spec's latents are \[3, 2, 4, 8\]"),
        ({"expected": {"codec": {"name": "time_fold"}}}, "was made with codec .*identity.*; the spec's world.codec"),
    ],
)
def test_trajectories_that_do_not_fit_are_refused(tmp_path, options, message):
    stored(tmp_path / "s")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "s", **options)


def test_other_stores_and_times_are_refused(tmp_path):
    with pytest.raises(UserError, match="no store at .*nowhere"):
        opened(tmp_path / "nowhere")
    with Writer(tmp_path / "latents", {"fields": {"latents": {"dtype": "float16", "shape": [3, 2, 4, 4]}}}):
        pass
    finish(tmp_path / "latents")
    with pytest.raises(UserError, match="holds latents and no trajectories"):
        opened(tmp_path / "latents")
    stored(tmp_path / "s", torch.tensor([1.0, 0.4, 0.9, 0.0]))
    with pytest.raises(UserError, match="expected 1 down to 0"):
        opened(tmp_path / "s")
    with pytest.raises(ValueError, match="not finite in fp16"):
        trajectories.rows_of([0], ["a"], ENCODER.encode(["a"]), Trajectory(torch.full((4, 1, *SHAPE), 1e6), TIMES))


def released(folder, reader):
    """The same rows in CausVid's layout, which has no times."""
    rows = [reader.row(key) for key in reader.entries]
    with lmdb.open(str(folder), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for number, row in enumerate(rows):
            transaction.put(f"latents_{number}_data".encode(), row.arrays["states"].tobytes())
            transaction.put(f"prompts_{number}_data".encode(), row.facts["caption"].encode())
        shape = (len(rows), *rows[0].arrays["states"].shape)
        transaction.put(b"latents_shape", " ".join(map(str, shape)).encode())


def test_an_ode_initialisation_takes_pairs_from_any_store(tmp_path):
    """The stage's own, a packed copy, and a conversion of released files give the same weights to the byte."""
    path, results = toy_spec(tmp_path), runs.Store(tmp_path / "runs")

    def weights(*changes):
        arm = spec.load(path, changes)
        nodes = experiment.plan(arm, "ode_init")
        results.execute(nodes, arm, lambda text: None)
        return [node.name for node in nodes], (results.folder(nodes[-1]) / "weights.safetensors").read_bytes()

    names, wanted = weights()
    assert names == ["teacher", "ode_pairs", "ode_init"]
    (own,) = (tmp_path / "runs" / "ode_pairs").glob("*/pairs")
    times = Reader(own).header["times"]
    assert times[0] == 1 and times[-1] == 0 and packing.verify(str(own))[0].done == 4
    packing.pack(str(own), str(tmp_path / "copy"))
    released(tmp_path / "released", Reader(own))
    packing.pack(str(tmp_path / "released"), str(tmp_path / "converted"), times=times)
    assert np.array_equal(Reader(tmp_path / "converted").header["times"], times)
    for name in ("copy", "converted"):
        assert weights(f"ode_init.pairs={tmp_path / name}") == (["teacher", "ode_init"], wanted)
    with pytest.raises(UserError, match="no state at t"):
        weights(f"ode_init.pairs={tmp_path / 'copy'}", "student.steps=[1.0, 0.123]")
    with pytest.raises(UserError, match="no store at"):
        weights(f"ode_init.pairs={tmp_path / 'nowhere'}")
