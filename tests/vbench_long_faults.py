"""Run by the reference judge's interpreter: what upstream's own Long mode does where ours does otherwise.

python vbench_long_faults.py FOLDER   ->   one JSON line; FOLDER holds grey/*.mp4, clips of levels (tests/videos.py)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from vbench_grit import worker

FOLDER = Path(sys.argv[1])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
kept = worker().define_operators()
long = worker().upstream_long("utils", FOLDER)

import torch  # noqa: E402
import vbench.subject_consistency as subject  # noqa: E402
import vbench2_beta_long as package  # noqa: E402

facts: dict[str, object] = {}
SECONDS = {"aesthetic_quality": 2, "imaging_quality": 2, "overall_consistency": 10, "color": 2}
ROWS = [
    {"prompt_en": "plain", "dimension": ["color"]},
    {"prompt_en": "a", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
]


def raised(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error).__name__


# Clip lengths of a prompt's video, and of one whose prompt is not in the list.
facts["seconds"] = {name: long.get_duration_from_json(f"{name}-0.mp4", ROWS, SECONDS) for name in ("plain", "a", "b")}

# Clips: the levels of the frames that upstream would write.
written: dict[str, list[int]] = {}


def note(path, frames, fps):
    levels = frames.double().mean(dim=(1, 2, 3))
    written[os.path.basename(path)] = [round((float(level) - 10) / 4) for level in levels]


long.write_video = note
for path in sorted((FOLDER / "grey").glob("*.mp4")):
    long.split_video_into_clips(str(path), str(FOLDER / "split"), 1 if "film" in path.name else 2)
facts["clips"] = written

# Both branches joined: a table that maps a score to itself, and names with and without an underscore.
table = FOLDER / "table.yaml"
table.write_text("".join(f"{n / 100}: {n / 100}\n" for n in range(101)))
config = FOLDER / "config.yaml"
config.write_text("{}")
options = {"slow_fast_eval_config": str(config), "bg_mapping_file_path": str(table), "dev_flag": False,
           "w_inclip": 0.5, "w_clip2clip": 0.5}  # fmt: skip


def fused(name, slow, fast):
    clips = [{"video_path": f"v/split_clip/{name}/{name}_{n:03d}.mp4", "video_results": slow} for n in range(2)]
    mean, _, videos = long.reorganize_clips_results(clips)
    whole = [{"video_path": f"v/cat/{name}.mp4", "video_results": fast}]
    return long.fuse_inclip_clip2clip(mean, fast, videos, whole, "background_consistency", **options)[0]


facts["fused"] = {
    "plain": fused("a robot-0", 0.9, 0.6), "underscore": fused("a_b robot-0", 0.9, 0.6),
    "zero": fused("a robot-0", 0.9, 0.0),
}  # fmt: skip

# Which clips are found, by the order in which the folder is listed.
videos = FOLDER / "videos"
for name in ("plain-0", "a-0"):
    (videos / "split_clip" / name).mkdir(parents=True)
    (videos / f"{name}.mp4").write_bytes(b"x")
    (videos / "split_clip" / name / f"{name}_000.mp4").write_bytes(b"x")
(FOLDER / "rows.json").write_text(json.dumps(ROWS))
judge = package.VBenchLong("cpu", str(FOLDER / "rows.json"), str(FOLDER / "out"))
listed, found = os.listdir, {}
for order in ("first", "last"):
    os.listdir = lambda path, order=order: sorted(listed(path), key=lambda n: (n == "split_clip") == (order == "last"))
    path = judge.build_full_info_json(
        str(videos), order, ["color", "overall_consistency"], mode="long_vbench_standard", num_of_samples_per_prompt=1
    )
    found[order] = sum(len(row["video_list"]) for row in json.loads(Path(path).read_text()))
os.listdir = listed
facts["clips_found"] = found

# A stop while clips are written leaves folders without them, which the next run takes for whole.
half = FOLDER / "half"
(half / "split_clip" / "a-0").mkdir(parents=True)
(half / "a-0.mp4").write_bytes(next((FOLDER / "grey").glob("*.mp4")).read_bytes())
cut = {"use_semantic_splitting": False, "clip_length_config": "none.yaml"}
package.load_clip_lengths = lambda path: SECONDS
facts["half_written"] = [raised(judge.preprocess, str(half), "long_vbench_standard", **cut),
                         len(list((half / "split_clip" / "a-0").iterdir()))]  # fmt: skip
unknown = FOLDER / "unknown"
unknown.mkdir()
(unknown / "b-0.mp4").write_bytes(b"x")
facts["unknown_prompt"] = raised(judge.preprocess, str(unknown), "long_vbench_standard", **cut)

# Subject consistency of videos of several lengths, on one GPU and on several.
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.AvgPool2d(112), torch.nn.Flatten(), torch.nn.Linear(12, 3, bias=False))
torch.hub.load = lambda **options: model
lengths = sorted(str(path) for path in (FOLDER / "lengths").glob("*.mp4"))
info = FOLDER / "info.json"
info.write_text(json.dumps([{"prompt_en": "x", "dimension": ["subject_consistency"], "video_list": lengths}]))
one, rows = subject.compute_subject_consistency(str(info), "cpu", {"read_frame": False})
subject.get_world_size, subject.gather_list_of_dict = (lambda: 2), (lambda values: values)
several, _ = subject.compute_subject_consistency(str(info), "cpu", {"read_frame": False})
facts["subject"] = {
    "one": one, "several": several, "videos": {os.path.basename(r["video_path"]): r["video_results"] for r in rows}
}  # fmt: skip
answers.write(json.dumps(facts) + "\n")
answers.close()
