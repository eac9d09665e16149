"""The reference judge: upstream VBench's own functions, run in its own environment, one JSON line a question.

This file is run by the interpreter of that environment, where causvid is not installed, so it imports nothing of it.
Weights come from local files that are named in the request to start; nothing is ever downloaded: connections fail.

    in:  {"dimension": ..., "video": path, "prompt": ..., "auxiliary": what upstream reads as its "auxiliary_info"}
    out: {"score": number or null}, {"error": text}, or {"unusable": text} where the judge itself can't be loaded

``subject_consistency.fast`` and ``background_consistency.fast`` judge the first frames of a long video's clips;
``temporal_flickering.static`` says whether upstream's static filter keeps a video (1 or 0).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# (video, prompt, auxiliary) -> raw score in [0, 1], or None
Ask = Callable[[str, str, Any], Any]


class Offline(OSError):
    """A judge tried to reach the network."""


def forbid_network() -> None:
    """Make every connection fail at once: a judge that lacks a file must say so."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise Offline("the reference judge never downloads; put the file in place, see 'causvid doctor vbench'")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.create_connection = refuse
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})


def define_operators() -> Any:
    """Schemas of torchvision's operators, which its wheel lacks beside a CPU build of torch; keep what is returned."""
    torch = importlib.import_module("torch")
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def upstream(name: str) -> Any:
    return importlib.import_module(f"vbench.{name}")


def upstream_long(name: str, folder: Path) -> Any:
    """A module of VBench-Long, which imports much that judging needs not, and that is not everywhere."""
    code = folder / "dreamsim_model" / "code"
    if code.is_dir() and str(code) not in sys.path:
        sys.path.append(str(code))
    files = importlib.import_module("torchvision.io")
    if not hasattr(files, "write_video"):
        vars(files)["write_video"] = None  # gone from current torchvision; only the splitting of videos calls it
    unused = {"scenedetect": ("open_video", "SceneManager", "split_video_ffmpeg"), "dreamsim": ("dreamsim",),
              "scenedetect.detectors": ("ContentDetector",), "scenedetect.video_splitter": ("split_video_ffmpeg",),
              "moviepy": (), "moviepy.editor": ("VideoFileClip",)}  # fmt: skip
    for module, names in unused.items():
        try:
            importlib.import_module(module)
        except ImportError:
            sys.modules[module] = types.ModuleType(module)
            vars(sys.modules[module]).update(dict.fromkeys(names))
    return importlib.import_module(f"vbench2_beta_long.{name}")


def _subject_fast(folder: Path, device: str) -> Ask:
    torch, module = importlib.import_module("torch"), upstream_long("subject_consistency", folder)
    code = str(folder / "dino_model" / "facebookresearch_dinov2_main")
    model = torch.hub.load(code, "dinov2_vitb14", source="local", pretrained=False)
    file = folder / "dino_model" / "dinov2_vitb14_pretrain.pth"
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model = model.to(device).eval()
    # Twice, since upstream divides by the number of videos less one.
    return lambda video, *_: module.subject_consistency_dinov2(model, [video, video], device, False)[1][0][
        "video_results"
    ]


def _background_fast(folder: Path, device: str) -> Ask:
    module = upstream_long("background_consistency", folder)
    make = importlib.import_module("dreamsim").dreamsim
    model, preprocess = make(pretrained=True, device=device, cache_dir=str(folder / "dreamsim_model"))
    return lambda video, *_: module.background_consistency_dreamsim(model, preprocess, [video], device, False)[1][0][
        "video_results"
    ]


def _subject(folder: Path, device: str) -> Ask:
    torch, module = importlib.import_module("torch"), upstream("subject_consistency")
    code = str(folder / "dino_model" / "facebookresearch_dino_main")
    # Upstream asks the hub for pretrained weights, which it then downloads whatever file is given.
    model = torch.hub.load(code, "dino_vitb16", source="local", pretrained=False)
    file = folder / "dino_model" / "dino_vitbase16_pretrain.pth"
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model = model.to(device).eval()
    return lambda video, *_: module.subject_consistency(model, [video], device, False)[1][0]["video_results"]


def _background(folder: Path, device: str) -> Ask:
    module = upstream("background_consistency")
    model, preprocess = importlib.import_module("clip").load(str(folder / "clip_model/ViT-B-32.pt"), device=device)
    return lambda video, *_: module.background_consistency(model, preprocess, [video], device, False)[1][0][
        "video_results"
    ]


def _flickering(folder: Path, device: str) -> Ask:
    return lambda video, *_: upstream("temporal_flickering").cal_score(video)


def _smoothness(folder: Path, device: str) -> Ask:
    module = upstream("motion_smoothness")
    config = Path(module.__file__).parent / "third_party/amt/cfgs/AMT-S.yaml"
    judge = module.MotionSmoothness(str(config), str(folder / "amt_model/amt-s.pth"), device)
    return lambda video, *_: judge.motion_score(video)


def _dynamic(folder: Path, device: str) -> Ask:
    module = upstream("dynamic_degree")
    options = {"model": str(folder / "raft_model/models/raft-things.pth")}
    options |= dict.fromkeys(("small", "mixed_precision", "alternate_corr"), False)
    judge = module.DynamicDegree(importlib.import_module("easydict").EasyDict(options), device)
    return lambda video, *_: judge.infer(video)


def _static(folder: Path, device: str) -> Ask:
    torch, module = importlib.import_module("torch"), upstream("cli.static_filter")
    vars(module)["DEVICE"] = device  # upstream names an accelerator there
    options = dict.fromkeys(("small", "mixed_precision", "alternate_corr"), False)
    state = torch.load(folder / "raft_model/models/raft-things.pth", map_location="cpu", weights_only=True)
    judge = object.__new__(module.StaticFilter)  # its constructor loads onto the device that the file names
    judge.model = module.RAFT(importlib.import_module("easydict").EasyDict(options))
    judge.model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    judge.model.to(device).eval()
    return lambda video, *_: judge.infer(video)


def _aesthetic(folder: Path, device: str) -> Ask:
    module = upstream("aesthetic_quality")
    head = module.get_aesthetic_model(str(folder / "aesthetic_model/emb_reader")).to(device)
    model, _ = importlib.import_module("clip").load(str(folder / "clip_model/ViT-L-14.pt"), device=device)
    return lambda video, *_: module.laion_aesthetic(head, model, [video], device)[0]


def _imaging(folder: Path, device: str) -> Ask:
    module = upstream("imaging_quality")
    model = module.MUSIQ(pretrained_model_path=str(folder / "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth")).to(device)
    model.training = False  # as upstream; its own modules stay as they were made
    return lambda video, *_: module.technical_quality(model, [video], device)[0]


def _detected(name: str) -> Callable[[Path, str], Ask]:
    def load(folder: Path, device: str) -> Ask:
        module = upstream(name)
        model = module.DenseCaptioning(device)
        start = model.initialize_model if name == "color" else model.initialize_model_det
        with contextlib.chdir(folder):  # where "bert-base-uncased" is found by its name
            start(model_weight=str(folder / "grit_model/grit_b_densecap_objectdet.pth"))

        def ask(video: str, prompt: str, auxiliary: Any) -> Any:
            info = {"prompt": prompt, "video_list": [video], "auxiliary_info": auxiliary}
            try:
                return vars(module)[name](model, [info], device)[1][0]["video_results"]
            except ZeroDivisionError:  # color: the object is in no frame
                return None

        return ask

    return load


def _action(folder: Path, device: str) -> Ask:
    module = upstream("human_action")
    weights = str(folder / "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth")
    # The label is read from the file's name, so the name must be the prompt's.
    return lambda video, *_: module.human_action(weights, [video], device)[0]


def _scene(folder: Path, device: str) -> Ask:
    module = upstream("scene")
    with contextlib.chdir(folder):  # where "bert-base-uncased" is found by its name
        model = module.tag2text_caption(
            pretrained=str(folder / "caption_model/tag2text_swin_14m.pth"), image_size=384, vit="swin_b"
        )
    model = model.eval().to(device)
    return lambda video, prompt, auxiliary: module.scene(
        model, [{"prompt": prompt, "video_list": [video], "auxiliary_info": auxiliary}], device
    )[1][0]["video_results"]


def _appearance(folder: Path, device: str) -> Ask:
    module = upstream("appearance_style")
    model, _ = importlib.import_module("clip").load(str(folder / "clip_model/ViT-B-32.pt"), device=device)
    return lambda video, prompt, auxiliary: module.appearance_style(
        model, [{"prompt": prompt, "video_list": [video], "auxiliary_info": auxiliary}], device
    )[0]


def _viclip(name: str) -> Callable[[Path, str], Ask]:
    def load(folder: Path, device: str) -> Ask:
        module = upstream(name)
        words = module.SimpleTokenizer(str(folder / "ViCLIP/bpe_simple_vocab_16e6.txt.gz"))
        model = module.ViCLIP(tokenizer=words, pretrain=str(folder / "ViCLIP/ViClip-InternVid-10M-FLT.pth")).to(device)
        return lambda video, prompt, _: vars(module)[name](
            model, [{"prompt": prompt, "video_list": [video]}], words, device
        )[0]

    return load


LOADERS: dict[str, Callable[[Path, str], Ask]] = {
    "subject_consistency": _subject, "background_consistency": _background, "temporal_flickering": _flickering,
    "motion_smoothness": _smoothness, "dynamic_degree": _dynamic, "aesthetic_quality": _aesthetic,
    "imaging_quality": _imaging, "human_action": _action, "scene": _scene, "appearance_style": _appearance,
    **{name: _detected(name) for name in ("object_class", "multiple_objects", "color", "spatial_relationship")},
    **{name: _viclip(name) for name in ("temporal_style", "overall_consistency")},
    "subject_consistency.fast": _subject_fast, "background_consistency.fast": _background_fast,
    "temporal_flickering.static": _static,
}  # fmt: skip


def main() -> None:
    """Answer questions from stdin on what stdout was; what upstream prints goes to stderr."""
    parser = argparse.ArgumentParser(description="Upstream VBench, a question a line.")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the judges' files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--find", nargs="*", help="only say which of these modules are there")
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if given.find is not None:
        answers.write(json.dumps({name: importlib.util.find_spec(name) is not None for name in given.find}) + "\n")
        return
    forbid_network()
    given.weights = given.weights.resolve()
    os.environ["VBENCH_CACHE_DIR"] = str(given.weights)
    kept, judges = define_operators(), {}
    for line in sys.stdin:
        question = json.loads(line)
        name, trouble = question["dimension"], "unusable"
        try:
            if name not in judges:
                judges[name] = LOADERS[name](given.weights, given.device)
            trouble = "error"
            score = judges[name](question["video"], question["prompt"], question["auxiliary"])
            answer = {"score": None if score is None else float(score)}
        except Exception as error:  # told to who asked, who goes on with the next
            answer = {trouble: f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    del kept


if __name__ == "__main__":
    main()
