# SPDX-License-Identifier: Apache-2.0
"""Real processes and a real Ray: the same files, bit by bit, whoever is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from cocoa.embed import ray_guard
from cocoa.embed.local import available_cores
from cocoa.embed.output import Output
from cocoa.embed.run import embed_dataset
from cocoa.quiet import LINES
from tests.cocoa.embed.conftest import ROOT, TINY

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "TORCH_LOGS"},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def command(source: Path, output: Path, *options: object) -> list[str]:
    words = [
        "embed",
        source,
        "--model",
        TINY,
        "--output-dir",
        output,
        "--rows-per-shard",
        16,
        "--workers",
        2,
        *options,
    ]
    return [sys.executable, "-m", "cocoa", *map(str, words)]


def start(source: Path, output: Path, *options: object) -> subprocess.Popen:
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        command(source, output, *options),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-4000:]
    assert not [text for text in LINES.values() if text in printed], printed
    return printed


def shards(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob("shard-*.parquet")}


def vectors(output: Path) -> dict[str, dict[str, list]]:
    """Ids and vectors of each shard; one with other threads would differ in them."""
    read = {file.name: pq.read_table(file) for file in output.glob("shard-*.parquet")}
    return {
        name: {"id": table["id"].to_pylist(), "embedding": table["embedding"].to_pylist()}
        for name, table in read.items()
    }


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def wait_for(condition, seconds: float):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def embed_here(source: Path, output: Path) -> None:
    """The same in this process, with one thread as each of two workers on two cores has."""
    embed_dataset(str(source), TINY, output, rows_per_shard=16, workers=1, show_progress_bar=False)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_workers_and_a_stopped_run_end_in_the_files_of_one_that_was_left_alone(
    images, tmp_path, here, one_thread
):
    folder = images(96)
    embed_here(folder, tmp_path / "whole")
    process = start(folder, tmp_path / "out")
    wait_for(lambda: len(list((tmp_path / "out").glob("shard-*"))), 240)
    workers = workers_of(tmp_path, "local", process.pid)
    os.kill(workers[0], signal.SIGKILL)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=240)
    if process.returncode:  # it may have been faster
        assert process.returncode == 130 and "run the same command again to go on" in printed
        assert "Traceback" not in printed
    wait_for(lambda: not any(map(is_alive, workers)), 60)
    assert "96 of 96 rows are embedded" in finish(start(folder, tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["threads"] == max(1, available_cores() // 2)
    assert Output(tmp_path / "out", "parquet").about(0)["threads"] == manifest["threads"], "those that torch had"
    if manifest["threads"] == 1:
        assert shards(tmp_path / "out") == shards(tmp_path / "whole")


@pytest.mark.slow
def test_workers_end_with_a_killed_driver(images, tmp_path):
    process = start(images(96), tmp_path / "out")
    workers = wait_for(lambda: [pid for pid in descendants(process.pid)], 120)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_alive, workers)), 60)


def test_wrong_arguments_answer_at_once(tmp_path):
    """Before torch is imported."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "image": "b.png"}\n')
    cases = [
        (["embed", "nothing", "--model", TINY, "--output-dir", "out"], "There is no file or folder nothing"),
        (["embed", "rows.jsonl", "--model", TINY, "--output-dir", "out"], "Say which columns"),
        (["embed", "rows.jsonl", "--model", TINY, "--output-dir", "out", "--text", "t"], "has no column 't'"),
        (
            ["embed", "rows.jsonl", "--text", "text", "--model", TINY, "--output-dir", "out", "--address", "x"],
            "--engine ray",
        ),
        (["embed", "rows.jsonl", "--model", "nofolder", "--output-dir", "out"], "There is no checkpoint folder"),
        (
            ["search", "nothing", "a"],
            "nothing does not exist: make them with `cocoa embed SOURCE --model MODEL --output-dir",
        ),
        (["search", ".", "a"], ". holds no vectors: make them with `cocoa embed"),
    ]
    code = """
import sys, time
from cocoa import cli
start = time.process_time()
try:
    cli.app(sys.argv[1:])
except SystemExit as end:
    assert end.code
print("torch" in sys.modules, time.process_time() - start)
"""
    for words, message in cases:
        taken = []
        while not taken or (min(taken) >= 1.5 and len(taken) < 3):  # cores that are shared count more seconds
            run = subprocess.run(
                [sys.executable, "-c", code, *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
            )
            has_torch, seconds = run.stdout.split()
            taken.append(float(seconds))
            assert message in " ".join(run.stderr.replace("│", "").split()), run.stderr
            assert has_torch == "False" and "Traceback" not in run.stderr
        assert min(taken) < 1.5, words
    assert not (tmp_path / "out").exists()


def test_actors_of_ray_give_the_same_files_and_leave_nothing_running(images, tmp_path, here, one_thread, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setitem(ENVIRONMENT, "COCOA_TEST", str(tmp_path))
    folder = images(48)
    embed_here(folder, tmp_path / "whole")
    printed = finish(start(folder, tmp_path / "out", "--engine", "ray"))
    assert "48 of 48 rows are embedded" in printed
    assert "WARNING" not in printed and "Ray instance" not in printed, printed
    if json.loads((tmp_path / "out" / "manifest.json").read_text())["threads"] == 1:
        assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    wait_for(lambda: not ray_processes(tmp_path), 60)


def test_the_guard_ends_what_has_its_mark():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours, other = (subprocess.Popen(sleep, env={**os.environ, ray_guard.MARK: mark}) for mark in ("ours", "other"))
    try:
        wait_for(lambda: psutil.Process(ours.pid).environ().get(ray_guard.MARK) == "ours", 60)
        ray_guard.end_cluster("ours")
        assert ours.wait(60) == -signal.SIGKILL and other.poll() is None
    finally:
        other.kill()
        other.wait()


def ray_processes(folder: Path) -> list[int]:
    """Processes of Ray that a test started, by what is in their environment."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and is_alive(int(place.name)):
            try:
                words = (place / "cmdline").read_bytes()
                ours = f"COCOA_TEST={folder}".encode() in (place / "environ").read_bytes()
            except OSError:
                continue
            if ours and b"ray" in words:
                found.append(int(place.name))
    return found


WATCH = """
import os, sys, time

def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".png"):
        line = f"{time.time_ns()} {arguments[0]}\\n".encode()
        os.write(LOG, line)

LOG = os.open(os.environ["COCOA_OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(watch)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_fifteen_kills_at_random_moments(images, tmp_path, monkeypatch, engine):
    """Kill workers and the driver in turn; the test records which images are opened, and when."""
    if engine == "ray":
        pytest.importorskip("ray")
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    monkeypatch.setitem(ENVIRONMENT, "COCOA_OPENED", str(tmp_path / "opened"))
    monkeypatch.setitem(ENVIRONMENT, "COCOA_TEST", str(tmp_path))
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", os.pathsep.join([str(tmp_path / "watch"), str(ROOT)]))
    folder, output = images(1500), tmp_path / "out"
    finish(start(folder, tmp_path / "whole"))
    (tmp_path / "opened").unlink()
    generator = random.Random(seed := int(time.time()))
    finished: dict[str, int] = {}
    kills = {"worker": 0, "driver": 0}
    while sum(kills.values()) < 15:
        process = start(folder, output, "--engine", engine)
        kill_at_random(process, tmp_path, engine, finished, kills, generator)
        finished |= {
            file.name: file.stat().st_mtime_ns for file in output.glob("shard-*") if file.name not in finished
        }
        if len(finished) > 80:  # nearly all are done: some are to be done again
            for name in generator.sample(sorted(finished), 60):
                (output / name).unlink()
                del finished[name]
    print(f"seed {seed}, kills {kills}")
    finish(start(folder, output, "--engine", engine))
    assert shards(output) == shards(tmp_path / "whole")
    ids = [row for table in vectors(output).values() for row in table["id"]]
    assert len(ids) == len(set(ids)) == 1500
    shard_of = {row: name for name, table in vectors(output).items() for row in table["id"]}
    assert all((output / name).stat().st_mtime_ns == written for name, written in finished.items())
    reads = defaultdict(list)
    for line in (tmp_path / "opened").read_text().splitlines():
        moment, path = line.split(" ", 1)
        name = shard_of[os.path.relpath(path, folder)]
        reads[name, path].append(int(moment))
    for (name, path), moments in reads.items():
        assert not [moment for moment in moments if moment > finished.get(name, moment)], f"{path} was read again"


def kill_at_random(process, folder, engine, finished, kills, generator) -> None:
    """Kill a worker, and then the driver, soon after it has begun to write; and wait until nothing of it is left."""
    output = folder / "out"
    wait_for(lambda: process.poll() is not None or len(shards(output)) > len(finished), 180)
    time.sleep(generator.uniform(0, 1))
    workers = [] if process.poll() is not None else workers_of(folder, engine, process.pid)
    if workers:
        os.kill(generator.choice(workers), signal.SIGKILL)
        kills["worker"] += 1
        time.sleep(generator.uniform(0, 0.5))
    if process.poll() is None:
        process.kill()
        kills["driver"] += 1
    process.communicate()
    wait_for(lambda: not any(map(is_alive, workers)), 60)
    if engine == "ray":
        wait_for(lambda: not ray_processes(folder), 60)


def workers_of(folder: Path, engine: str, driver: int) -> list[int]:
    """Processes that hold a model."""
    if engine == "local":
        return [pid for pid in descendants(driver) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    named = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in ray_processes(folder)]
    return [pid for pid, words in named if re.match(rb"ray::ShardWorker", words)]
