"""The commands ``causvid data ...`` as a person calls them, for tests."""

from __future__ import annotations

import gc
import json

from causvid import cli


def command(capsys, *arguments):
    """(exit status, counts, stderr) of a command; what it raises beside its exit is raised."""
    try:
        cli.main(["data", *map(str, arguments), "--json"])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    gc.collect()
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else {}, " ".join(err.split())
