"""Run by the reference judge's interpreter: random networks in place of weights, and upstream's own answers for them.

python vbench_upstream.py WEIGHTS VIDEOS   ->   one JSON line {dimension: {video: score}}
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

WEIGHTS, VIDEOS = Path(sys.argv[1]), sorted(Path(sys.argv[2]).glob("*.mp4"))
os.environ["VBENCH_CACHE_DIR"] = str(WEIGHTS)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import clip  # noqa: E402
import torchvision.io  # noqa: E402
import vbench.aesthetic_quality as aesthetic  # noqa: E402
import vbench.appearance_style as appearance  # noqa: E402
import vbench.background_consistency as background  # noqa: E402
import vbench.dynamic_degree as dynamic  # noqa: E402
import vbench.imaging_quality as imaging  # noqa: E402
import vbench.motion_smoothness as smoothness  # noqa: E402
import vbench.subject_consistency as subject  # noqa: E402
import vbench.temporal_flickering as flickering  # noqa: E402
from easydict import EasyDict  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from vbench.cli import static_filter  # noqa: E402

HUB = '''
import torch
dependencies = ["torch"]

def dino_vitb16(pretrained=True, path=None, **kwargs):
    """A small stand-in for DINO with its entry's signature."""
    layers = [torch.nn.Conv2d(3, 32, 16, 16), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(32 * 196, 64)]
    model = torch.nn.Sequential(*layers)
    if pretrained:
        model.load_state_dict(torch.load(path, weights_only=True))
    return model
'''

DREAMSIM = '''
import torch

class Model(torch.nn.Conv2d):
    """A stand-in for DreamSim with its embedding's entry."""
    def embed(self, images):
        return self(images).flatten(1)

def dreamsim(pretrained=True, device="cuda", cache_dir="./models", **kwargs):
    model = Model(3, 8, 32, 32).to(device)
    if pretrained:
        model.load_state_dict(torch.load(f"{cache_dir}/dino_vitb16_pretrain.pth", weights_only=True))
    return model.eval().requires_grad_(False), None
'''


def save(path: str, value: object) -> str:
    target = WEIGHTS / path
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, target)
    return str(target)


torch.manual_seed(0)
torch.set_num_threads(1)
hub = WEIGHTS / "dino_model" / "facebookresearch_dino_main"
hub.mkdir(parents=True)
(hub / "hubconf.py").write_text(HUB)
scope: dict = {}
exec(HUB, scope)
dino = save("dino_model/dino_vitbase16_pretrain.pth", scope["dino_vitb16"](False).state_dict())
small = clip.model.CLIP(512, 224, 2, 128, 32, 77, 49408, 128, 2, 2)
large = clip.model.CLIP(768, 224, 2, 128, 14, 77, 49408, 128, 2, 2)
vit_b, vit_l = (str(WEIGHTS / "clip_model" / name) for name in ("ViT-B-32.pt", "ViT-L-14.pt"))
(WEIGHTS / "clip_model").mkdir()
for network, path in ((small, vit_b), (large, vit_l)):  # archives of code and weights, as the published files are
    example = (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.trace(network.eval(), example, check_trace=False).save(path)
save("aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth", torch.nn.Linear(768, 1).state_dict())
musiq = save("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", imaging.MUSIQ(pretrained=False).state_dict())
raft_options = EasyDict({"small": False, "mixed_precision": False, "alternate_corr": False})
flow = {f"module.{k}": v for k, v in dynamic.RAFT(raft_options).state_dict().items()}  # named as in the published file
raft = save("raft_model/models/raft-things.pth", flow)
config = str(Path(smoothness.__file__).parent / "third_party/amt/cfgs/AMT-S.yaml")
amt = save(
    "amt_model/amt-s.pth", {"state_dict": smoothness.build_from_cfg(OmegaConf.load(config).network).state_dict()}
)

NAMES = ("subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality", "dynamic_degree",
         "motion_smoothness", "temporal_flickering", "appearance_style")  # fmt: skip
info = WEIGHTS / "info.json"
style = {"appearance_style": {"appearance_style": "oil painting"}}
rows = [
    {"prompt_en": p.stem[:-2], "dimension": list(NAMES), "video_list": [str(p)], "auxiliary_info": style}
    for p in VIDEOS
]
info.write_text(json.dumps(rows))
dino_options = {"repo_or_dir": str(hub), "path": dino, "model": "dino_vitb16", "source": "local", "read_frame": False}
found = {
    "subject_consistency": subject.compute_subject_consistency(info, "cpu", dino_options),
    "background_consistency": background.compute_background_consistency(info, "cpu", [vit_b, False]),
    "aesthetic_quality": aesthetic.compute_aesthetic_quality(
        info, "cpu", [vit_l, str(WEIGHTS / "aesthetic_model/emb_reader")]
    ),
    "imaging_quality": imaging.compute_imaging_quality(info, "cpu", {"model_path": musiq}),
    "dynamic_degree": dynamic.compute_dynamic_degree(info, "cpu", {"model": raft}),
    "motion_smoothness": smoothness.compute_motion_smoothness(info, "cpu", {"config": config, "ckpt": amt}),
    "temporal_flickering": flickering.compute_temporal_flickering(info, "cpu", []),
    "appearance_style": appearance.compute_appearance_style(info, "cpu", {"name": vit_b}),
}
# The fast branch of long videos: modules that only splitting needs are not installed.
code = WEIGHTS / "dreamsim_model" / "code"
(code / "dreamsim").mkdir(parents=True)
(code / "dreamsim" / "__init__.py").write_text(DREAMSIM)
sys.path.append(str(code))
torchvision.io.write_video = None
for module, names in {
    "scenedetect": ["open_video", "SceneManager", "split_video_ffmpeg"], "scenedetect.detectors": ["ContentDetector"],
    "scenedetect.video_splitter": ["split_video_ffmpeg"], "moviepy": [], "moviepy.editor": ["VideoFileClip"],
}.items():  # fmt: skip
    sys.modules[module] = types.ModuleType(module)
    vars(sys.modules[module]).update(dict.fromkeys(names))
import dreamsim  # noqa: E402
import vbench2_beta_long.background_consistency as long_background  # noqa: E402
import vbench2_beta_long.subject_consistency as long_subject  # noqa: E402

second = WEIGHTS / "dino_model" / "facebookresearch_dinov2_main"
second.mkdir()
(second / "hubconf.py").write_text(HUB.replace("dino_vitb16", "dinov2_vitb14"))
dinov2 = scope["dino_vitb16"](False).eval()
save("dino_model/dinov2_vitb14_pretrain.pth", dinov2.state_dict())
for each in ("dino_vitb16_pretrain.pth", "open_clip_vitb16_pretrain.pth.tar", "clip_vitb16_pretrain.pth.tar"):
    save(f"dreamsim_model/{each}", torch.nn.Conv2d(3, 8, 32, 32).state_dict())
paths = [str(path) for path in VIDEOS]
model, _ = dreamsim.dreamsim(cache_dir=str(WEIGHTS / "dreamsim_model"), device="cpu")
found["subject_consistency.fast"] = long_subject.subject_consistency_dinov2(dinov2, paths, "cpu", False)
found["background_consistency.fast"] = long_background.background_consistency_dreamsim(model, None, paths, "cpu", False)

static_filter.DEVICE = "cpu"
sieve = static_filter.StaticFilter(EasyDict({**raft_options, "model": raft}), "cpu")
results = [{"video_path": path, "video_results": sieve.infer(path)} for path in paths]
found["temporal_flickering.static"] = (None, results)

table = {}
for name, (_, videos) in found.items():
    factor = 100 if name == "imaging_quality" else 1
    table[name] = {Path(v["video_path"]).name: float(v["video_results"]) / factor for v in videos}
# What upstream pools appearance style from on several GPUs.
several = {Path(v["video_path"]).name: v["cur_sim"] for v in found["appearance_style"][1]}
(WEIGHTS / "several_gpus.json").write_text(json.dumps(several))
answers.write(json.dumps(table) + "\n")
answers.close()
