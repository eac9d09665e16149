"""An installed package, outside any checkout, finds its specs and its trained teachers."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_works_outside_a_checkout(tmp_path, monkeypatch):
    from hatchling.build import build_wheel

    for name in ("dist", "site", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / "dist" / build_wheel(str(tmp_path / "dist"))) as wheel:
        wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path / "elsewhere",
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    assert python("-c", "import causvid; print(causvid.__file__)").startswith(str(tmp_path / "site"))
    assert "tiny/causvid: ok" in python("-m", "causvid.cli", "check")
    for kind in ("bidirectional", "causal"):
        folder = python("-m", "causvid.cli", "run", "tiny/causvid", "until=teacher", f"teacher={kind}").strip()
        assert (Path(folder) / "weights.safetensors").is_file() and folder.startswith(str(tmp_path / "elsewhere"))
        assert '"commit": null' in (Path(folder) / "DONE").read_text()
