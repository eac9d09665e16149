"""Published numbers, laid beside one's own and marked as quoted: none was measured here, nor under one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VBENCH = "Huang et al., VBench: Comprehensive Benchmark Suite for Video Generative Models. CVPR 2024, arXiv 2311.17982."
VBENCH_LONG = "Huang et al., VBench++: Comprehensive and Versatile Benchmark Suite. 2024, arXiv 2411.13503."
BIBTEX = """@inproceedings{huang2024vbench,
    title={VBench: Comprehensive Benchmark Suite for Video Generative Models},
    author={Huang, Ziqi and He, Yinan and Yu, Jiashuo and Zhang, Fan and Si, Chenyang and Jiang, Yuming and Zhang, Yuanhan and Wu, Tianxing and Jin, Qingyang and Chanpaisit, Nattapol and Wang, Yaohui and Chen, Xinyuan and Wang, Limin and Lin, Dahua and Qiao, Yu and Liu, Ziwei},
    booktitle={CVPR},
    year={2024}
}"""  # noqa: E501

# The sixteen, in the order of the public leaderboard.
ORDER = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip


@dataclass(frozen=True)
class Quoted:
    """A published table: what it is, where it stands, its columns, and its rows as (name, values in percent)."""

    title: str
    source: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, tuple[float, ...]]]
    places: int = 2  # decimals, as printed


# CausVid, table 7: total, quality, semantic, then the sixteen.
LEADERBOARD = Quoted(
    "VBench-Long, all sixteen dimensions",
    "Yin et al., CausVid, CVPR 2025, arXiv 2412.07772, table 7",
    ("total", "quality", "semantic", *ORDER),
    (
        ("Vchitect", (82.24, 83.54, 77.06, 96.83, 96.66, 98.57, 98.98, 63.89, 60.41, 65.35, 86.61, 68.84, 97.20, 87.04,
                      57.55, 56.57, 23.73, 25.01, 27.57)),
        ("Jimeng", (81.97, 83.29, 76.69, 97.25, 98.39, 99.03, 98.09, 38.43, 68.80, 67.09, 89.62, 69.08, 90.10, 89.05,
                    77.45, 44.94, 22.27, 24.7, 27.10)),
        ("CogVideoX-5B", (81.61, 82.75, 77.04, 96.23, 96.52, 98.66, 96.92, 70.97, 61.98, 62.90, 85.23, 62.11, 99.40,
                          82.81, 66.35, 53.20, 24.91, 25.38, 27.59)),
        ("Vidu", (81.89, 83.85, 74.04, 94.63, 96.55, 99.08, 97.71, 82.64, 60.87, 63.32, 88.43, 61.68, 97.40, 83.24,
                  66.18, 46.07, 21.54, 23.79, 26.47)),
        ("Kling", (81.85, 83.39, 75.68, 98.33, 97.60, 99.30, 99.40, 46.94, 61.21, 65.62, 87.24, 68.05, 93.40, 89.90,
                   73.03, 50.86, 19.62, 24.17, 26.42)),
        ("CogVideoX1.5-5B", (82.17, 82.78, 79.76, 96.87, 97.35, 98.88, 98.31, 50.93, 62.79, 65.02, 87.47, 69.65, 97.20,
                             87.55, 80.25, 52.91, 24.89, 25.19, 27.30)),
        ("Gen-3", (82.32, 84.11, 75.17, 97.10, 96.62, 98.61, 99.23, 60.14, 63.34, 66.82, 87.81, 53.64, 96.40, 80.90,
                   65.09, 54.57, 24.31, 24.71, 26.69)),
        ("CausVid", (84.27, 85.65, 78.75, 97.53, 97.19, 96.24, 98.05, 92.69, 64.15, 68.88, 92.99, 72.15, 99.80, 80.17,
                     64.65, 56.58, 24.27, 25.33, 27.51)),
    ),
)  # fmt: skip

CAUSVID_ABLATION = Quoted(
    "The paper's ablation: who teaches, and how the student starts",
    "Yin et al., CausVid, CVPR 2025, arXiv 2412.07772",
    ("temporal quality", "frame quality", "text alignment"),
    (
        ("bidirectional, many steps", (94.6, 62.7, 29.6)),
        ("causal, many steps", (92.4, 60.1, 28.5)),
        ("4 steps: bidirectional teacher, no ODE initialisation", (93.4, 60.6, 29.4)),
        ("4 steps: ODE initialisation, no teacher", (92.9, 48.1, 25.3)),
        ("4 steps: causal teacher, ODE initialisation", (91.9, 61.7, 28.2)),
        ("4 steps: bidirectional teacher, ODE initialisation", (94.7, 64.4, 30.1)),
    ),
    places=1,
)

CAUSAL_FORCING = Quoted(
    "Causal Forcing's ablation, Wan2.1-1.3B",
    "Zhu et al., Causal Forcing, 2026, arXiv 2602.02214, table 2",
    ("total", "quality", "semantic", "dynamic degree"),
    (
        ("diffusion forcing, many steps", (81.76, 82.52, 78.71, 60.0)),
        ("teacher forcing, many steps", (82.12, 82.73, 79.67, 50.0)),
        ("chunk-wise: Self-Forcing's ODE + DMD", (82.00, 82.18, 81.29, 24.0)),
        ("chunk-wise: causal ODE + DMD", (84.04, 84.59, 81.84, 68.0)),
        ("frame-wise: Self-Forcing's ODE + DMD", (81.83, 82.66, 78.50, 2.0)),
        ("frame-wise: causal ODE + DMD", (83.75, 84.35, 81.37, 64.0)),
        ("asymmetric consistency distillation", (79.07, 79.99, 75.37, 59.0)),
        ("causal consistency distillation", (81.48, 82.13, 78.88, 51.0)),
    ),
)

SYSTEMS = Quoted(
    "Systems side by side, Wan2.1-1.3B unless named otherwise",
    "Zhu et al., Causal Forcing, 2026, arXiv 2602.02214, table 1",
    ("total", "quality", "semantic", "frames per second", "latency, s"),
    (
        ("Wan2.1-1.3B, many steps", (83.37, 84.30, 79.65, 0.78, 103.0)),
        ("SkyReels-V2-1.3B", (81.97, 83.96, 74.01, 0.49, 112.0)),
        ("MAGI-1-4.5B", (78.88, 81.67, 67.72, 0.19, 282.0)),
        ("CausVid", (81.33, 83.98, 70.72, 17.0, 0.69)),
        ("Self Forcing", (83.74, 84.48, 80.77, 17.0, 0.69)),
        ("Causal Forcing", (84.04, 84.59, 81.84, 17.0, 0.69)),
    ),
)

TABLES = (CAUSVID_ABLATION, CAUSAL_FORCING, LEADERBOARD, SYSTEMS)
NOTE = (
    "Quoted from papers: not measured here, other prompts, seeds, codecs and judges. The same Wan2.1-1.3B teacher is "
    "quoted at 84.26, 83.37 and 82.78 by three of them."
)
