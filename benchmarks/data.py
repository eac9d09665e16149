"""Is the store faster to read than the released layout, and is decoding in time? All in one run.

    python benchmarks/data.py [--rows 24] [--json]

Rows of 4 MiB (fp16) are read in random order, once from a store (readahead, whole rows asked for at once, views of the
map, each row's checksum checked when a process first reads it) and once from the released layout as released (readahead
off, each row copied to fp32). Every page of a row is touched, in both. "Cold" means that the system was told to drop
the file's pages before; each pass is of its own process. Decoding is compared with imageio, frame by frame to RGB;
process is timed with 1 and 2 workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np

SHAPE = (16, 16, 64, 128)  # fp16: 4 MiB


def make(folder: Path, rows: int) -> None:
    """The same rows in both layouts."""
    from causvid.data.lmdb_store import Writer
    from causvid.data.rows import Row

    writer = Writer(folder / "store", {"fields": {"latents": {"dtype": "float16", "shape": list(SHAPE)}}})
    old = lmdb.open(str(folder / "released"), map_size=rows << 23)
    generator = np.random.default_rng(0)
    for number in range(rows):
        array = generator.standard_normal(SHAPE, np.float32).astype(np.float16)
        writer.add([Row(f"{number:06d}", {"latents": array})])
        with old.begin(write=True) as transaction:
            transaction.put(f"latents_{number}_data".encode(), array.tobytes())
    old.close()


def drop(path: Path) -> None:
    """Ask the system to forget the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read(kind: str, folder: Path, rows: int, warm: bool) -> float:
    """Seconds per row, in this process."""
    order = np.random.default_rng(1).permutation(rows)
    path = folder / kind
    if not warm:
        drop(path / "data.mdb")
    if kind == "store":
        from causvid.data.lmdb_store import Reader

        reader = Reader(path)
        keys = [f"{number:06d}" for number in order]

        def one(place: int) -> None:
            reader.prefetch(keys[place : place + 2])
            reader.row(keys[place]).arrays["latents"].reshape(-1)[::2048].sum()
    else:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)

        def one(place: int) -> None:
            with environment.begin() as transaction:
                data = transaction.get(f"latents_{order[place]}_data".encode())
            np.frombuffer(data, np.float16).reshape(SHAPE).astype(np.float32).reshape(-1)[::2048].sum()

    if warm:
        for place in range(rows):
            one(place)
    begin = time.perf_counter()
    for place in range(rows):
        one(place)
    return (time.perf_counter() - begin) / rows


def reads(folder: Path, rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds per row of each layout, medians of passes in turns, and how much faster the store is."""
    out: dict[str, float] = {}
    for name in ("cold", "warm"):
        seconds: dict[str, list[float]] = {"store": [], "released": []}
        for _ in range(repeats):
            for kind, found in seconds.items():
                command = [sys.executable, __file__, "--pass", kind, str(folder), str(rows), name]
                found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        middle = {kind: statistics.median(found) for kind, found in seconds.items()}
        out |= {f"{name}_{kind}_ms": 1000 * value for kind, value in middle.items()}
        out[f"{name}_ratio"] = middle["released"] / middle["store"]
    return out


def decoding(folder: Path) -> dict[str, float]:
    """Frames per second of our decoder and of imageio, and of ``process`` with 1 and 2 workers."""
    import imageio.v2 as imageio

    from causvid.data import steps
    from causvid.data.clips import Wanted, all_frames, encode_rgb

    generator = np.random.default_rng(0)
    frames = np.kron(generator.integers(0, 256, (120, 18, 32, 3), np.uint8), np.ones((1, 16, 16, 1), np.uint8))
    clips = folder / "clips"
    clips.mkdir()
    for number in range(4):
        (clips / f"{number}.mp4").write_bytes(encode_rgb(frames, 25, 23))
    path = str(clips / "0.mp4")
    begin = time.perf_counter()
    count = len(all_frames(path))
    ours = count / (time.perf_counter() - begin)
    begin = time.perf_counter()
    count = len([np.asarray(frame) for frame in imageio.get_reader(path, "ffmpeg")])
    theirs = count / (time.perf_counter() - begin)
    out = {"decode_fps": ours, "imageio_fps": theirs, "decode_ratio": ours / theirs}
    for workers in (1, 2):
        begin = time.perf_counter()
        steps.process(str(clips), str(folder / f"out{workers}"), Wanted(240, 416, 60, 16), workers)
        out[f"process_{workers}_s"] = time.perf_counter() - begin
    out["scaling"] = out["process_1_s"] / out["process_2_s"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to measure; default the temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        make(folder, options.rows)
        results = reads(folder, options.rows, options.repeats) | decoding(folder)
    if options.json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:<20} {value:.2f}")


if __name__ == "__main__":
    if "--pass" in sys.argv:
        kind, folder, rows, warm = sys.argv[2:]
        print(read(kind, Path(folder), int(rows), warm == "warm"))
    else:
        main()
