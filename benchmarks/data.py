"""Is the store faster to read than the released layout, is decoding in time, and does processing scale?

    python benchmarks/data.py [--rows 24] [--parts reads,decoding,scaling] [--json]

Rows of 4 MiB (fp16) are read in random order, once from a store (readahead, whole rows asked for at once, views of the
map, each row's checksum checked when a process first reads it) and once from the released layout as released (readahead
off, each row copied to fp32). Every page of a row is touched, in both. Each pass is a process of its own, and passes of
both layouts take turns. A cold pass's time is the mean of its rows, as the median hides the rows that wait for the disk
while others are read ahead; a warm one's is that of its median row.

"Cold": the file is written back, the system is told to drop its pages (posix_fadvise DONTNEED; no process maps it
then), and mincore says how much stayed: more than 1 % ends the run. What lies below the system, such as a host's
cache, is as it is. Cold reads are timed by the clock. "Warm": every row was read before by the same process. "Batch":
warm, and copied to an fp32 batch of 8 in both, as training does. These two wait for nothing and are timed in seconds of
the processor, which other work on the machine lengthens less.

Decoding is compared with imageio, frame by frame to RGB, in processor seconds of all processes. ``process`` is timed
with 1 and 2 workers, by the clock and in processor seconds: only on an idle machine does the clock tell how it scales.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np

SHAPE = (16, 16, 64, 128)  # fp16: 4 MiB
BATCH = 8


def make(folder: Path, rows: int) -> None:
    """The same rows in both layouts."""
    from causvid.data.lmdb_store import Writer
    from causvid.data.rows import Row

    header = {"fields": {"latents": {"dtype": "float16", "shape": list(SHAPE)}}}
    old = lmdb.open(str(folder / "released"), map_size=rows << 23)
    generator = np.random.default_rng(0)
    with Writer(folder / "store", header) as writer:
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


def resident(path: Path) -> float:
    """Share of the file's pages that are in memory."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as held:
        view = np.frombuffer(held, np.uint8)
        found = (ctypes.c_ubyte * pages)()
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), found):
            raise OSError(ctypes.get_errno(), "mincore")
        del view
    return sum(each & 1 for each in found) / pages


def read(kind: str, folder: Path, rows: int, name: str) -> float:
    """Seconds per row, in this process: the mean of cold rows, else those of the median row, or batch."""
    order = np.random.default_rng(1).permutation(rows)
    path = folder / kind
    if name == "cold":
        drop(path / "data.mdb")
        stayed = resident(path / "data.mdb")
        if stayed > 0.01:
            raise SystemExit(f"{stayed:.1%} of the pages stayed in memory: reads would not be cold")
    if kind == "store":
        from causvid.data.lmdb_store import Reader

        reader = Reader(path)
        keys = [f"{number:06d}" for number in order]

        def one(place: int) -> np.ndarray:
            reader.prefetch(keys[place : place + 2])
            return reader.row(keys[place]).arrays["latents"]
    else:
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)

        def one(place: int) -> np.ndarray:
            with environment.begin() as transaction:
                data = transaction.get(f"latents_{order[place]}_data".encode())
            return np.frombuffer(data, np.float16).reshape(SHAPE).astype(np.float32)

    if name != "cold":
        for place in range(rows):
            one(place).reshape(-1)[::1024].sum()
    clock = time.perf_counter if name == "cold" else time.process_time
    seconds = []
    size = BATCH if name == "batch" else 1
    for first in range(0, rows - size + 1, size):
        begin = clock()
        found = [one(first + i) for i in range(size)]
        if name == "batch":
            np.stack(found, dtype=np.float32)
        else:
            found[0].reshape(-1)[::1024].sum()
        seconds.append((clock() - begin) / size)
    return statistics.fmean(seconds) if name == "cold" else statistics.median(seconds)


def reads(folder: Path, rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds per row of each layout, medians of passes in turns, and how much faster the store is."""
    out: dict[str, float] = {}
    for name in ("cold", "warm", "batch"):
        seconds: dict[str, list[float]] = {"store": [], "released": []}
        for _ in range(repeats):
            for kind, found in seconds.items():
                command = [sys.executable, __file__, "--pass", kind, str(folder), str(rows), name]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found.append(float(done.stdout))
        middle = {kind: statistics.median(found) for kind, found in seconds.items()}
        out |= {f"{name}_{kind}_ms": 1000 * value for kind, value in middle.items()}
        out[f"{name}_ratio"] = middle["released"] / middle["store"]
    return out


def clips(folder: Path) -> Path:
    """Four clips of 120 frames, 288 x 512."""
    from causvid.data.clips import encode_rgb

    generator = np.random.default_rng(0)
    frames = np.kron(generator.integers(0, 256, (120, 18, 32, 3), np.uint8), np.ones((1, 16, 16, 1), np.uint8))
    (folder / "clips").mkdir()
    for number in range(4):
        (folder / "clips" / f"{number}.mp4").write_bytes(encode_rgb(frames, 25, 23))
    return folder / "clips"


def decoding(source: Path, repeats: int) -> dict[str, float]:
    """Frames per second of our decoder and of imageio, the medians of turns: of the processor, with its children's.

    imageio decodes in a process of its own, which on a busy machine gets a share of its own.
    """
    import imageio.v2 as imageio

    from causvid.data.clips import all_frames

    path = str(source / "0.mp4")
    rates: dict[str, list[float]] = {"decode": [], "imageio": []}
    for _ in range(repeats):
        for name, found in rates.items():
            begin = sum(os.times()[:4])
            if name == "decode":
                count = len(all_frames(path))
            else:
                with imageio.get_reader(path, "ffmpeg") as reader:
                    count = len([np.asarray(frame) for frame in reader])
            found.append(count / (sum(os.times()[:4]) - begin))
    ours, theirs = (statistics.median(found) for found in rates.values())
    return {"decode_fps": ours, "imageio_fps": theirs, "decode_ratio": ours / theirs}


def scaling(source: Path, folder: Path) -> dict[str, float]:
    """Seconds of ``process`` with 1 and 2 workers, by the clock and of the processor."""
    from causvid.data import steps
    from causvid.data.clips import Wanted

    out = {"cores": float(len(os.sched_getaffinity(0)))}
    for workers in (1, 2):
        begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        steps.process(str(source), str(folder / f"out{workers}"), Wanted(240, 416, 60, 16), workers)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        out[f"process_{workers}_s"] = time.perf_counter() - begin
        out[f"process_{workers}_cpu_s"] = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return out | {"scaling": out["process_1_s"] / out["process_2_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to measure; default the temporary folder")
    parser.add_argument("--cores", default="", help="for scaling alone, as in 0,1; default those of this process")
    parser.add_argument("--parts", default="reads,decoding,scaling")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        results: dict[str, float] = {}
        if "reads" in options.parts:
            make(folder, options.rows)
            results |= reads(folder, options.rows, options.repeats)
        source = clips(folder)
        if "decoding" in options.parts:
            results |= decoding(source, options.repeats)
        if "scaling" in options.parts:
            if options.cores:
                os.sched_setaffinity(0, [int(core) for core in options.cores.split(",")])
            results |= scaling(source, folder)
    if options.json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:<20} {value:.2f}")


if __name__ == "__main__":
    if "--pass" in sys.argv:
        kind, folder, rows, name = sys.argv[2:]
        print(read(kind, Path(folder), int(rows), name))
    else:
        main()
