"""Workers end with their parent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = "import sys, time; from causvid.data import pool; pool.stay_with_parent(int(sys.argv[1])); time.sleep(1); "


@pytest.mark.parametrize(("alive", "status"), [(True, 7), (False, 1)])
def test_a_worker_whose_parent_was_killed_while_it_started_ends(alive, status):
    """Its parent is not the process that started it any more; one whose parent lives goes on to its own end."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    parent = os.getpid() if alive else gone.pid
    rest = "sys.exit(7)" if alive else "time.sleep(600)"
    assert subprocess.run([sys.executable, "-c", CHILD + rest, str(parent)], timeout=300).returncode == status
