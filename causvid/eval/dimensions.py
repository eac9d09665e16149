"""The sixteen dimensions of VBench: what each needs, how it is pooled, and how its score is normalised.

Facts of VBench 0.1.5 (Huang et al., CVPR 2024, arXiv 2311.17982) and VBench-Long (arXiv 2411.13503). A dimension is
judged with one of three fidelities: ``reference`` (upstream's code, in its own environment), ``exact`` (ours, proven
equal to upstream's), or ``proxy`` (needs no weights; for smoke runs). Only a dimension with a ``scale`` can be
normalised, and so enter a total; a proxy with a scale is refused when its class is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from causvid import registry
from causvid.registry import register

Half = Literal["quality", "semantic"]
Fidelity = Literal["reference", "exact", "proxy"]
Pooling = Literal["clips_then_videos", "frames", "found_only"]

SHORT_CLIP, LONG_CLIP = 2, 10  # seconds


@dataclass(frozen=True)
class Weights:
    """A file that a judge reads: ``path`` below the cache folder, its size and SHA-256 where these are published.

    ``sha256`` may be the published first digits only. None is unknown: the digest of the file that was used is then
    what a result records. ``source`` says where people get it.
    """

    path: str
    source: str
    bytes: int | None = None
    sha256: str | None = None
    gigabytes: float | None = None  # where only a rounded size is known


@dataclass(frozen=True)
class Scale:
    """Where a raw score enters: its half, the range [low, high] that becomes [0, 1], and its weight."""

    half: Half
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


class Dimension:
    """What one dimension needs and how it is judged; facts are class attributes, and there is no state.

    Attributes:
        scale: None for what can't enter a total.
        suite: the suite of prompts, as its name among VBench's prompt lists.
        clip_seconds: length of the clips of a long video.
        pooling: how clips and videos become one score; see :mod:`causvid.eval.pooling`.
        imports: modules beside vbench itself that the judge needs.
        looks_for: the key under which upstream's function reads what the prompt's rule looks for; empty: nothing.
        version: raised when our way of computing it changes, so that older rows are not reused.
    """

    scale: ClassVar[Scale | None] = None
    fidelity: ClassVar[Fidelity] = "reference"
    suite: ClassVar[str] = ""
    clip_seconds: ClassVar[int] = SHORT_CLIP
    pooling: ClassVar[Pooling] = "clips_then_videos"
    weights: ClassVar[tuple[Weights, ...]] = ()
    imports: ClassVar[tuple[str, ...]] = ()
    fast_branch: ClassVar[bool] = False
    looks_for: ClassVar[str] = ""
    version: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        if cls.fidelity == "proxy" and cls.scale is not None:
            raise TypeError(f"{cls.__name__} is a proxy and has a scale; a proxy never enters a total")


def quality(low: float = 0.0, high: float = 1.0, weight: float = 1.0) -> Scale:
    return Scale("quality", low, high, weight)


def semantic(low: float = 0.0, high: float = 1.0) -> Scale:
    return Scale("semantic", low, high)


CLIP_B32 = Weights(
    "clip_model/ViT-B-32.pt", "OpenAI CLIP", 353_976_522,
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
)  # fmt: skip
CLIP_L14 = Weights(
    "clip_model/ViT-L-14.pt", "OpenAI CLIP", 932_768_134,
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
)  # fmt: skip
RAFT = Weights("raft_model/models/raft-things.pth", "RAFT, models.zip")
GRIT = Weights("grit_model/grit_b_densecap_objectdet.pth", "VBench's model collection")
VICLIP = Weights("ViCLIP/ViClip-InternVid-10M-FLT.pth", "VBench's model collection")
VICLIP_WORDS = Weights("ViCLIP/bpe_simple_vocab_16e6.txt.gz", "OpenAI CLIP")
BERT_WORDS = Weights(
    "bert-base-uncased/vocab.txt", "google-bert/bert-base-uncased", 231_508,
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)  # fmt: skip
BERT = Weights(
    "bert-base-uncased/model.safetensors", "google-bert/bert-base-uncased", 440_449_768,
    "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
)  # fmt: skip
DETECTRON = ("detectron2",)


@register("dimension", "subject_consistency")
class SubjectConsistency(Dimension):
    """DINO ViT-B/16: mean of half the cosine (at least 0) to the previous frame plus half that to the first."""

    scale = quality(0.1462)
    suite = "subject_consistency"
    pooling = "frames"
    weights = (Weights("dino_model/dino_vitbase16_pretrain.pth", "DINO"),)
    fast_branch = True


@register("dimension", "background_consistency")
class BackgroundConsistency(Dimension):
    """CLIP ViT-B/32: as the subject's, of the whole picture."""

    scale = quality(0.2615)
    suite = "scene"
    pooling = "frames"
    weights = (CLIP_B32,)
    imports = ("clip",)
    fast_branch = True


@register("dimension", "motion_smoothness")
class MotionSmoothness(Dimension):
    """AMT-S predicts the odd frames from the even ones: (255 - mean absolute error) / 255."""

    scale = quality(0.706, 0.9975)
    suite = "subject_consistency"
    weights = (Weights("amt_model/amt-s.pth", "AMT"),)
    imports = ("omegaconf",)


@register("dimension", "dynamic_degree")
class DynamicDegree(Dimension):
    """RAFT at about 8 fps: whether enough pairs of frames move; a yes or no for each video."""

    scale = quality(weight=0.5)
    suite = "subject_consistency"
    weights = (RAFT,)
    imports = ("easydict",)


@register("dimension", "aesthetic_quality")
class AestheticQuality(Dimension):
    """LAION's linear head on CLIP ViT-L/14, divided by 10."""

    scale = quality()
    suite = "overall_consistency"
    weights = (CLIP_L14, Weights("aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth", "LAION aesthetic-predictor"))
    imports = ("clip",)


@register("dimension", "imaging_quality")
class ImagingQuality(Dimension):
    """MUSIQ trained on SPAQ, divided by 100."""

    scale = quality()
    suite = "overall_consistency"
    weights = (Weights("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", "pyiqa", None, "358bb6af"),)
    imports = ("pyiqa",)


@register("dimension", "object_class")
class ObjectClass(Dimension):
    """GRiT on 16 frames: share of frames in which the object is detected."""

    scale = semantic()
    suite = "object_class"
    looks_for = "object"
    weights = (GRIT, BERT_WORDS)
    imports = DETECTRON


@register("dimension", "multiple_objects")
class MultipleObjects(Dimension):
    """GRiT on 16 frames: share of frames in which both objects are detected."""

    scale = semantic()
    suite = "multiple_objects"
    looks_for = "object"
    weights = (GRIT, BERT_WORDS)
    imports = DETECTRON


@register("dimension", "human_action")
class HumanAction(Dimension):
    """UMT ViT-L/16 on Kinetics-400: whether the action is among the five most likely with a score of .85 or more."""

    scale = semantic()
    suite = "human_action"
    clip_seconds = LONG_CLIP
    weights = (Weights("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth", "VBench's model collection"),)
    imports = ("timm",)


@register("dimension", "color")
class Color(Dimension):
    """GRiT on 16 frames: share of frames with the object in which it has the colour; videos without it don't count."""

    scale = semantic()
    suite = "color"
    looks_for = "color"
    pooling = "found_only"
    weights = (GRIT, BERT_WORDS)
    imports = DETECTRON


@register("dimension", "spatial_relationship")
class SpatialRelationship(Dimension):
    """GRiT on 16 frames: how far the boxes of two objects stand in the relation, by their centres and overlap."""

    scale = semantic()
    suite = "spatial_relationship"
    looks_for = "spatial_relationship"
    weights = (GRIT, BERT_WORDS)
    imports = DETECTRON


@register("dimension", "scene")
class Scene(Dimension):
    """Tag2Text captions of 16 frames: share of those that hold all words of the scene."""

    scale = semantic(high=0.8222)
    suite = "scene"
    looks_for = "scene"
    weights = (
        Weights("caption_model/tag2text_swin_14m.pth", "Recognize Anything", gigabytes=4.5),
        BERT_WORDS,
        BERT,
    )
    imports = ("fairscale",)


@register("dimension", "appearance_style")
class AppearanceStyle(Dimension):
    """CLIP ViT-B/32: mean logit of frames and the style's words, divided by 100."""

    scale = semantic(0.0009, 0.2855)
    suite = "appearance_style"
    looks_for = "appearance_style"
    weights = (CLIP_B32,)
    imports = ("clip",)


@register("dimension", "temporal_style")
class TemporalStyle(Dimension):
    """ViCLIP: cosine of the prompt and 8 middle frames."""

    scale = semantic(high=0.364)
    suite = "temporal_style"
    clip_seconds = LONG_CLIP
    weights = (VICLIP, VICLIP_WORDS)


@register("dimension", "overall_consistency")
class OverallConsistency(Dimension):
    """ViCLIP: cosine of the prompt and 8 middle frames."""

    scale = semantic(high=0.364)
    suite = "overall_consistency"
    clip_seconds = LONG_CLIP
    weights = (VICLIP, VICLIP_WORDS)


def dimensions() -> dict[str, type[Dimension]]:
    """Every registered dimension, by name."""
    found = {name: component.target for name, component in registry.components("dimension").items()}
    return {
        name: target for name, target in found.items() if isinstance(target, type) and issubclass(target, Dimension)
    }


def scales() -> dict[str, Scale]:
    """The scale of each dimension that a total is made of: VBench's sixteen, and no other."""
    return {name: dimension.scale for name, dimension in dimensions().items() if dimension.scale is not None}
