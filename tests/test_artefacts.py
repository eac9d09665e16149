"""What CausVid released: named entries, fetched whole from anywhere to anywhere."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import pytest
import torch

from causvid.data import artefacts
from causvid.data.folders import Folder
from causvid.errors import UserError
from causvid.models.wan import SIZES


@pytest.mark.parametrize("name", artefacts.ARTEFACTS)
def test_an_entry_tells_layout_size_and_where_to_put_it(name, monkeypatch):
    entry = artefacts.ARTEFACTS[name]
    assert entry.name == name and entry.address.startswith("hf://")
    assert re.fullmatch(r"about \d+(\.\d)? GB \(computed.*\)", entry.size)
    monkeypatch.setitem(artefacts.ARTEFACTS, name, replace(entry, address="memory://not-there"))
    with pytest.raises(UserError) as told:
        artefacts.fetch(name, "memory://dst/x")
    assert "to memory://dst/x/" in str(told.value) and entry.layout in str(told.value)
    assert entry.size in str(told.value)


def test_the_size_of_a_checkpoint_is_that_of_its_parameters():
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in SIZES["wan_1_3b"].build().parameters())
    assert (
        f"about {4 * count / 1e9:.1f} GB" in artefacts.CHECKPOINT
        and f"{count / 1e9:.2f} billion" in artefacts.CHECKPOINT
    )
    assert all(e.size == artefacts.CHECKPOINT for name, e in artefacts.ARTEFACTS.items() if "checkpoint" in name)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_a_damaged_copy_is_fetched_again_where_a_digest_is_known(known, elsewhere, tmp_path, monkeypatch, capsys):
    source, place = Folder("memory://released"), Folder(f"memory://copies{known}" if elsewhere else str(tmp_path / "x"))
    source.write("a/model.pt", b"weights")
    digests = {"a/model.pt": hashlib.sha256(b"weights").hexdigest()} if known else {}
    entry = artefacts.Artefact("causvid-latents", str(source), "a layout", "7 bytes", digests)
    monkeypatch.setitem(artefacts.ARTEFACTS, "causvid-latents", entry)
    assert artefacts.fetch("causvid-latents", str(place)).done == 1 and place.read("a/model.pt") == b"weights"
    place.write("a/model.pt", b"weightz")
    tally = artefacts.fetch("causvid-latents", str(place))
    assert (tally.given, tally.done, tally.skipped) == (1, int(known), int(not known))
    assert place.read("a/model.pt") == (b"weights" if known else b"weightz")
    assert ("known by size alone" in capsys.readouterr().err) is not known
