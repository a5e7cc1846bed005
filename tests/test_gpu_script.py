# SPDX-License-Identifier: Apache-2.0
"""What .ci/gpu.py does without a network and without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu.py"


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The script as a module, in a tree of its own without wheels."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "WHEELS", tmp_path / ".wheels")
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


def run(gpu, tmp_path, jobs, only=None, minutes=1.0, small=False):
    gpu.JOBS[:] = jobs
    options = {"output": tmp_path / "out", "device": "cpu", "small": small, "minutes": minutes, "only": only}
    to_do = gpu.run(argparse.Namespace(**options))
    summary = tmp_path / "out" / "summary.json"
    return to_do, json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}


def test_a_failed_job_stops_no_other_and_only_it_is_run_again(gpu, tmp_path, capsys):
    jobs = [gpu.Job("bad", 1, "-c 'print(1); raise SystemExit(3)'"), gpu.Job("good", 1, "-c 'print(2)'")]
    to_do, summary = run(gpu, tmp_path, jobs)
    assert to_do
    assert [summary[name]["rc"] for name in ("bad", "good")] == [3, 0]
    assert summary["bad"]["tail"] == "1\n"
    jobs[0].command = "-c 'print(3)'"
    to_do, summary = run(gpu, tmp_path, jobs)
    assert not to_do
    assert summary["bad"]["tail"] == "3\n"
    assert "good             done before" in capsys.readouterr().out


def test_a_short_try_does_not_stand_for_the_job_itself(gpu, tmp_path):
    jobs = [gpu.Job("print", 1, "-c 'import sys; print(sys.argv[1:])'", "--few")]
    assert run(gpu, tmp_path, jobs, small=True)[1]["print"]["tail"] == "['--few']\n"
    assert run(gpu, tmp_path, jobs)[1]["print"]["tail"] == "[]\n"


def test_a_job_is_stopped_at_its_limit_with_all_that_it_started(gpu, tmp_path):
    child = "import time; time.sleep(60)"
    parent = f'-c \'import subprocess, sys; p = subprocess.Popen([sys.executable, "-c", "{child}"]); '
    parent += "print(p.pid, flush=True); p.wait()'"
    started = time.monotonic()
    to_do, summary = run(gpu, tmp_path, [gpu.Job("endless", 0.02, parent)])
    assert to_do
    assert time.monotonic() - started < 30
    assert summary["endless"]["outcome"] == "stopped after 5 s"
    state = Path(f"/proc/{summary['endless']['tail'].strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_nothing_starts_without_time(gpu, tmp_path, capsys):
    assert run(gpu, tmp_path, [gpu.Job("late", 1, "-c 0")], minutes=0.1) == (True, {})
    assert "no time left" in capsys.readouterr().out


def test_what_comes_back_is_small_and_can_be_gone_on_from(gpu, tmp_path):
    write = '-c \'import os; os.makedirs("{work}/scratch"); open("{work}/scratch/weights", "w"); '
    write += 'open("{work}/numbers.json", "w").write("1"); print(os.environ["PYTHONPATH"])\''
    _, summary = run(gpu, tmp_path, [gpu.Job("write", 1, write)])
    assert summary["write"]["tail"].strip().split(os.pathsep)[-1] == str(tmp_path)
    assert sorted(os.listdir(tmp_path / "out")) == ["numbers.json", "results.tar.gz", "summary.json"]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["logs/write.log", "numbers.json", "summary.json"]


def test_what_pip_freeze_lists_is_read(gpu):
    text = "# of the machine\ntorch==2.11.0+cu130\nhuggingface_hub==1.33.0\n\npandas @ file:///pandas.whl\n"
    assert gpu.read_freeze(text) == {"torch": "2.11.0+cu130", "huggingface-hub": "1.33.0", "pandas": None}


def test_every_measurement_exists(gpu):
    from benchmarks.__main__ import PUBLISHED, shape_parts_of
    from benchmarks.ablation import SETTINGS, Settings

    def named(module):
        commands = [job.command for job in gpu.JOBS if f"-m {module} " in job.command]
        return {part for command in commands for part in re.findall(r"--only (\S+)", command)}

    assert named("benchmarks") and named("benchmarks") <= set(shape_parts_of(PUBLISHED, 1))
    arms = Settings.load(SETTINGS.with_name("ablation_wordnet_few.yaml")).arms
    assert named("benchmarks.ablation") and named("benchmarks.ablation") <= set(arms)


def write_wheel(folder, name, version, *needs):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))
    return path


def test_only_what_is_missing_is_collected_and_what_that_needs(gpu, monkeypatch):
    gpu.WHEELS.mkdir()
    index = {"a": ("2.0", "b<2", "c>=1; extra == 'all'", "old>=3", "new>=1"), "b": ("1.5",), "old": ("3.1",)}
    asked = []

    def download(command, check):
        asked.append(command[-1])
        name = asked[-1].partition("<")[0].partition(">")[0]
        write_wheel(gpu.WHEELS, name, *index[name])

    monkeypatch.setattr(gpu.subprocess, "run", download)
    has = {"old": "2.0", "new": None, "torch": "2.11.0+cu130"}
    wheels = gpu.collect([Requirement("a>=1"), Requirement("torch>=2.6"), Requirement("b")], has, "3.12")
    assert sorted(wheels) == ["a", "b", "old"]
    assert asked == ["a>=1", "b", "old>=3"]


def test_a_pruned_wheel_records_what_it_holds(gpu, tmp_path):
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    files = [f"bitsandbytes/libbitsandbytes_{each}.so" for each in ("cpu", "cuda126", "cuda130", "cuda132", "xpu2026")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.writestr(file, "")
        archive.writestr("bitsandbytes-1.0.dist-info/RECORD", "".join(f"{file},sha256=x,0\n" for file in files))
    gpu.prune(wheel, gpu.DROPPED["bitsandbytes"].format(cuda="130"))
    with zipfile.ZipFile(wheel) as archive:
        *kept, record = archive.namelist()
        assert kept == [files[0], files[2]]
        assert [line.split(",")[0] for line in archive.read(record).decode().splitlines()] == kept
