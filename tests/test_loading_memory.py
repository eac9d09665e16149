"""Peak memory of loading a network from files, as the kernel counts it, in a process that has read nothing before."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from causvid import tensor_files, weights
from causvid.models import wan_files
from causvid.models.wan import SIZES, config_of, links

# 420 MB in fp32: large beside what Python itself takes in a while, and no tensor of it is 2% of the whole.
SIZE = replace(SIZES["wan_1_3b"].cut(24), dim=512, ffn_dim=2048, heads=4, text_dim=512)
LOAD = """
import json, sys
from pathlib import Path
import torch
from causvid.models import wan_files
from causvid.models.wan import Size

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
size = Size(**json.loads(sys.argv[2]))
with torch.device("meta"):
    model = size.build()
torch.zeros(1000) + 1
before = peak()
found = wan_files.find(Path(sys.argv[1]))
wan_files.load(model, size, found, torch.float32, "cpu")
own = sum(p.nbytes for p in model.parameters())
total = float(sum(p.sum(dtype=torch.float64) for p in model.parameters()))
print(json.dumps({"ratio": (peak() - before) / own, "bytes": own, "sum": total}))
"""


def tensors(prefix=""):
    generator = torch.Generator().manual_seed(0)
    for link in links(SIZE, "official"):
        for name in link.theirs:
            yield prefix + name, torch.randn(link.shape, generator=generator) * 0.02


def write(kind, folder):
    """The same weights in shards, in one file, or as PyTorch writes them; returns what is loaded."""
    weights.write_json(folder / "config.json", config_of(SIZE, "official"))
    if kind == "pt":
        torch.save({"generator": dict(tensors("model.")), "step": 3}, folder / "model.pt")
        return folder / "model.pt"
    if kind == "pth":
        torch.save(dict(tensors()), folder / "diffusion_pytorch_model.pth")
        return folder
    tensor_files.write_shards(folder, wan_files.OFFICIAL_STEM, tensors(), 60_000_000 if kind == "shards" else 10**10)
    assert len(list(folder.glob("*.safetensors"))) == (8 if kind == "shards" else 1)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("kind", ["shards", "file", "pt", "pth"])
def test_loading_takes_at_most_1_15_times_the_weights(kind, tmp_path):
    """Pages of the files count, too: of what is mapped into memory, little may stay there."""
    source = write(kind, tmp_path)
    command = [sys.executable, "-c", LOAD, str(source), json.dumps(asdict(SIZE))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    expected = sum(float(tensor.double().sum()) for _, tensor in tensors())
    assert told["bytes"] > 300e6 and told["sum"] == pytest.approx(expected, rel=1e-9)
    assert 0.9 < told["ratio"] <= 1.15
    print(f"{kind}: {told['ratio']:.3f} x the weights")
