"""Eight viewers of a server for a minute: errors, blocks per viewer, and the memory that is left when they are gone.

python benchmarks/streaming_load.py --viewers 8 --seconds 60
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from stream_server import Page, memory, server, until

from causvid.serve.checkpoints import SHIPPED, Checkpoint

PROMPTS = ("a red circle moves left", "a blue square moves up", "a green triangle moves down")


def visit(address: str, seconds: float, number: int, out: list[dict]) -> None:
    """One page: a new prompt now and then, a fork, and blocks as fast as they come."""
    begin, blocks, waits = time.monotonic(), 0, []
    try:
        with Page(address) as page:
            page.start(seed=number)
            while time.monotonic() - begin < seconds:
                asked = time.monotonic()
                page.block()
                waits.append(time.monotonic() - asked)
                blocks += 1
                if blocks % 10 == 5:
                    page.say(
                        "prompt", text=PROMPTS[(number + blocks) % 3], policy=("keep", "recache", "cut")[blocks % 3]
                    )
        out.append({"blocks": blocks, "longest_wait_s": round(max(waits, default=0), 2)})
    except Exception as error:  # whatever it is, it is what the test is for
        out.append({"blocks": blocks, "error": f"{type(error).__name__}: {error}"})


def crowd(address: str, hall: object, viewers: int, seconds: float) -> list[dict]:
    """All viewers at once, until the last is gone."""
    out: list[dict] = []
    threads = [threading.Thread(target=visit, args=(address, seconds, n, out)) for n in range(viewers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not hall.viewers)  # type: ignore[attr-defined]
    return out


def main() -> None:
    """Warm up with a short crowd, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--viewers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    told = parser.parse_args()
    with server({SHIPPED: Checkpoint(SHIPPED)}, viewers=told.viewers) as (address, hall):
        crowd(address, hall, told.viewers, min(10, told.seconds))
        time.sleep(1)
        gc.collect()
        before, here = memory(hall), psutil.Process().memory_info().rss
        visits = crowd(address, hall, told.viewers, told.seconds)
        time.sleep(1)
        gc.collect()
        after, there = memory(hall), psutil.Process().memory_info().rss
        print(json.dumps({
            "viewers": told.viewers, "seconds": told.seconds, "visits": visits, "restarts": hall.link.restarts,
            "errors": [visit["error"] for visit in visits if "error" in visit],
            "worker_memory_ratio": round(after / before, 4), "server_memory_ratio": round(there / here, 4),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
