"""Run by the reference judge's interpreter: the worker as it is, with networks that see what they are told to.

python vbench_grit.py --weights WEIGHTS ...   as vbench_worker.py; WEIGHTS/seen.json holds {"detections": [[caption,
box, [label]], ...], "caption": text}, the same for every frame. GRiT itself needs detectron2, Tag2Text weights.

python vbench_grit.py --read PROMPTS NAME...   one JSON line {NAME: [[prompt, auxiliary], ...]} as upstream reads them
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path


def told() -> dict:
    return json.loads((Path(sys.argv[sys.argv.index("--weights") + 1]) / "seen.json").read_text())


class DenseCaptioning:
    """The entries of upstream's wrapper of GRiT that its four dimensions call."""

    def __init__(self, device):
        self.device = device

    def initialize_model(self, model_weight):
        self.weight = model_weight

    initialize_model_det = initialize_model

    def run_caption_tensor(self, frame):
        return [told()["detections"], None]


class Captioner:
    """The entries of Tag2Text that scene calls."""

    def __init__(self, **options):
        self.options = options

    def eval(self):
        return self

    def to(self, device):
        return self

    def generate(self, images, tag_input=None, return_tag_predict=True):
        return [told()["caption"]] * len(images), None


def stub(name: str, **values: object) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(values)


def worker():
    path = Path(__file__).parents[1] / "causvid" / "eval" / "vbench_worker.py"
    spec = importlib.util.spec_from_file_location("vbench_worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__" and "--read" in sys.argv:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kept = worker().define_operators()
    from vbench.utils import load_dimension_info

    prompts, *names = sys.argv[2:]
    found = {name: load_dimension_info(prompts, dimension=name, lang="en")[1] for name in names}
    table = {name: [[row["prompt"], row["auxiliary_info"]] for row in rows] for name, rows in found.items()}
    answers.write(json.dumps(table) + "\n")
    answers.close()
elif __name__ == "__main__":
    stub("vbench.third_party.grit_model", DenseCaptioning=DenseCaptioning)
    stub("vbench.third_party.tag2Text.tag2text", tag2text_caption=lambda **options: Captioner(**options))
    worker().main()
