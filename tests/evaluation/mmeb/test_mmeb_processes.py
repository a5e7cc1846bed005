# SPDX-License-Identifier: Apache-2.0
"""An evaluation that is killed, one that processes share, and what it takes beside embedding."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.assets import asset_path
from evaluation.encoders import Encoder
from evaluation.mmeb.data import load_tasks
from evaluation.mmeb.evaluate import evaluate_model
from evaluation.mmeb.tasks import EMOJI_TASKS
from tests.evaluation.conftest import TINY

KILLED = """
import sys
from evaluation import vectors
from evaluation.encoders import Encoder
from evaluation.mmeb.tasks import EMOJI_TASKS
from evaluation.mmeb.data import load_tasks
from evaluation.mmeb.evaluate import evaluate_model

vectors.CHUNK = 16
model, data, output_dir = sys.argv[1:]
print("begun", flush=True)
loaded = load_tasks(EMOJI_TASKS[:4], data, data + "/images")
evaluate_model(Encoder(model), loaded, output_dir, benchmark="Emoji", show_progress_bar=False)
"""


def kill_and_compare(emoji, tmp_path, kills):
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    root = str(Path(__file__).parents[3])
    settings = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(folder):
        command = [sys.executable, str(script), str(asset_path(TINY)), str(emoji), str(tmp_path / folder)]
        process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        return process

    whole = start("whole")
    begun = time.monotonic()  # since it has imported everything, as the others are waited for
    assert whole.wait(300) == 0, whole.stderr.read()
    seconds = time.monotonic() - begun
    killed = 0
    generator = np.random.default_rng(kills)
    for _ in range(kills):
        process = start("killed")
        time.sleep(generator.uniform(0.1, 0.5) * seconds)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    process = start("killed")
    assert process.wait(300) == 0, process.stderr.read()
    assert killed, "else this test says nothing"
    (folder,) = (path.parent.name for path in (tmp_path / "whole").glob("*/scores.json"))
    for name in ("scores.json", *(f"queries/{task.name}.jsonl" for task in EMOJI_TASKS[:4])):
        ended, whole = (tmp_path / run / folder / name for run in ("killed", "whole"))
        assert ended.read_bytes() == whole.read_bytes(), name
    assert not list((tmp_path / "killed").rglob(".partial-*.json*"))


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_files(emoji, tmp_path):
    kill_and_compare(emoji, tmp_path, 2)


@pytest.mark.slow
def test_an_evaluation_killed_ten_times_ends_with_the_same_files(emoji, tmp_path):
    kill_and_compare(emoji, tmp_path, 10)


SHARED = """
import sys
from accelerate import PartialState
from evaluation.encoders import Encoder
from evaluation.mmeb.tasks import EMOJI_TASKS
from evaluation.mmeb.data import load_tasks
from evaluation.mmeb.evaluate import evaluate_model

state = PartialState(cpu=True)
model, data, output_dir = sys.argv[1:]


class Counting(Encoder):
    embedded = 0

    def __call__(self, items):
        self.embedded += len(items)
        return super().__call__(items)


encoder = Counting(model)
loaded = load_tasks(EMOJI_TASKS[:2], data, data + "/images")
found = evaluate_model(encoder, loaded, output_dir, benchmark="Emoji", show_progress_bar=False)
assert (found is None) == (state.process_index > 0)
with open(f"{output_dir}/{state.process_index}.txt", "w") as file:
    print(encoder.embedded, file=file)
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_processes_share_an_evaluation(emoji, tmp_path):
    """Each embeds a part of tasks of three hundred inputs, and none what another does; the vectors are the same."""
    script = tmp_path / "run.py"
    script.write_text(SHARED)
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(script), str(asset_path(TINY)), str(emoji), str(tmp_path / "two")]
    result = subprocess.run([sys.executable, *launcher, *arguments], env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those have; the last bits of sums depend on it
    try:
        scores = evaluate_model(
            Encoder(str(asset_path(TINY))),
            load_tasks(EMOJI_TASKS[:2], str(emoji), emoji / "images"),
            tmp_path / "one",
            benchmark="Emoji",
            show_progress_bar=False,
        )
    finally:
        torch.set_num_threads(threads)
    parts = [int((tmp_path / "two" / f"{process}.txt").read_text()) for process in (0, 1)]
    assert min(parts) > 200 and sum(parts) == sum(task.inputs for task in scores.tasks), parts
    ours, shared = (json.loads(next((tmp_path / name).glob("*/scores.json")).read_text()) for name in ("one", "two"))
    assert ours == shared
    files = [{path.name for path in (tmp_path / name).rglob("*.safetensors")} for name in ("one", "two")]
    assert files[0] == files[1], "named by what they hold"


@pytest.mark.slow
def test_an_evaluation_takes_little_more_than_embedding(emoji, tmp_path):
    """The time outside of the model on a task, against the time in it; `make bench` has the ratio on more."""
    encoder, inside = Encoder(str(asset_path(TINY))), []

    class Timed:
        name, fingerprint, weights = encoder.name, encoder.fingerprint, encoder.weights
        image_resolution = None
        check = staticmethod(encoder.check)

        def __call__(self, items):
            begun = time.monotonic()
            found = encoder(items)
            inside.append((len(items), time.monotonic() - begun))
            return found

    begun = time.monotonic()
    loaded = load_tasks(EMOJI_TASKS[4:5], str(emoji), emoji / "images")
    scores = evaluate_model(Timed(), loaded, tmp_path, show_progress_bar=False)
    whole = time.monotonic() - begun
    assert sum(count for count, _ in inside) == scores.tasks[0].inputs
    assert whole < 3 * sum(seconds for _, seconds in inside) + 1, "a bound for a busy machine"
