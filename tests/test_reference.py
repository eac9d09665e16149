"""The reference judge's environment without it: what is said when it is missing, broken, or can't be made."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from causvid.cli import app
from causvid.errors import UserError
from causvid.eval import reference
from causvid.eval.aggregate import scales
from causvid.eval.vbench_worker import LOADERS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSVID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))


def test_every_dimension_has_a_loader():
    more = {"subject_consistency.fast", "background_consistency.fast"}  # VBench-Long judges these twice
    more |= {"temporal_flickering.static"}  # the filter before it
    assert set(LOADERS) == set(scales()) | more


def test_the_doctor_says_what_is_missing_and_where_it_goes(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "vbench"])
    assert result.exit_code == 3 and len(result.stdout.splitlines()) == 16
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert lines["temporal_flickering"].endswith("ready")
    assert "causvid vbench setup" in lines["scene"] and str(tmp_path / "weights" / "caption_model") in lines["scene"]
    assert "353,976,522 bytes, sha256 40d365715913" in lines["background_consistency"]
    assert "facebookresearch_dino_main" in lines["subject_consistency"]


def test_a_file_of_another_size_or_content_is_told(tmp_path, monkeypatch):
    path = tmp_path / "clip_model" / "ViT-B-32.pt"
    path.parent.mkdir()
    path.write_bytes(b"x")
    assert "has 1 bytes" in reference.missing_files("background_consistency", tmp_path)[0].what
    path = tmp_path / "pyiqa_model" / "musiq_spaq_ckpt-358bb6af.pth"
    path.parent.mkdir()
    path.write_bytes(b"x")
    assert "another content" in reference.missing_files("imaging_quality", tmp_path)[0].what


def test_asking_before_the_set_up_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="causvid vbench setup"):
        reference.interpreter()


def test_without_packages_the_way_to_get_them_is_told_and_the_next_try_goes_on(tmp_path, monkeypatch):
    calls = []

    def fail(command):
        calls.append(command)
        if "install" in command and len(calls) < 3:
            reference_run([*command[:0], "false"])

    reference_run = reference._run
    monkeypatch.setattr(reference, "_run", fail)
    with pytest.raises(UserError, match="PIP_FIND_LINKS") as told:
        reference.setup(lambda text: None)
    assert "pip download" in str(told.value) and not (reference.environment() / "READY").exists()
    reference.environment().mkdir(parents=True, exist_ok=True)
    folder = reference.setup(lambda text: None)
    assert json.loads((folder / "READY").read_text())["judge"] == "vbench 0.1.5"
    count = len(calls)
    assert reference.setup(lambda text: None) == folder and len(calls) == count  # a third time nothing is done


def test_a_change_of_pins_is_another_environment(tmp_path, monkeypatch):
    first = reference.environment()
    pins = tmp_path / "vbench.txt"
    pins.write_text(reference.constraints().read_text() + "\n# a comment\n")
    monkeypatch.setattr(reference, "constraints", lambda: pins)
    assert reference.environment() == first
    pins.write_text(pins.read_text() + "numpy==1.26.4\n")
    assert reference.environment() != first
