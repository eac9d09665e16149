"""Scene cuts, for videos that show several scenes: VBench-Long's semantic splitting, by PySceneDetect."""

from __future__ import annotations

from pathlib import Path

from causvid.errors import UserError

THRESHOLD = 35.0  # of the ContentDetector, as VBench-Long has it
LEAST_FRAMES = 15  # of a scene: the detector's own default


def scenes(path: Path, count: int) -> list[tuple[int, int]]:
    """[start, stop) of each scene of a video of ``count`` frames; one scene where there is no cut.

    Raises:
        UserError: PySceneDetect is not installed, or can't read the file.
    """
    try:
        from scenedetect import ContentDetector, detect
        from scenedetect.video_stream import VideoOpenFailure
    except ImportError as error:
        raise UserError("semantic splitting needs PySceneDetect: pip install 'causvid[eval]'") from error
    try:
        found = detect(str(path), ContentDetector(threshold=THRESHOLD, min_scene_len=LEAST_FRAMES))
    except (VideoOpenFailure, OSError) as error:
        raise UserError(f"can't be searched for scene cuts: {error}") from error
    starts = sorted({0, *(start.get_frames() for start, _ in found)} - {count})
    return list(zip(starts, [*starts[1:], count], strict=True))
