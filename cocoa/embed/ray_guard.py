# SPDX-License-Identifier: Apache-2.0
"""A process that outlives the driver of a Ray cluster, and ends what is left of the cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil

MARK = "COCOA_RAY_CLUSTER"
"""Environment variable that the processes of a cluster inherit."""
GRACE = 10
"""Seconds that Ray has to end them itself."""


def start_guard(mark: str) -> subprocess.Popen:
    """Start the process; it waits until the pipe to it is closed, as the end of its parent does."""
    command = [sys.executable, "-m", "cocoa.embed.ray_guard", mark]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def end_cluster(mark: str) -> None:
    """Kill the processes that have the mark, but this one."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.kill()
        except psutil.Error:  # it has ended, or is another user's
            pass


if __name__ == "__main__":
    sys.stdin.read()
    time.sleep(GRACE)
    end_cluster(sys.argv[1])
