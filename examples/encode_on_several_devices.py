# SPDX-License-Identifier: Apache-2.0
"""
Embed a folder of pictures with several GPUs, or with several processes on a CPU.

    python examples/encode_on_several_devices.py my_pictures --model my_model/final --devices cuda:0 cuda:1

The vectors go to `vectors.npy`, the names of the pictures in the same order to `vectors.json`. Without `--model` the
tiny model that comes with the package is used; it knows emoji and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from cocoa import CocoaTransformer, asset_path, list_images


def main() -> None:
    """Read the command line, embed, and compare with one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your pictures")
    parser.add_argument("--model", default="tiny", help="folder or Hub name of a CoCoA model, or 'tiny'")
    parser.add_argument("--devices", nargs="+", help="one for each process; by default all GPUs, or twice the CPU")
    parser.add_argument("--output", type=Path, default=Path("vectors.npy"), help="where the vectors go")
    options = parser.parse_args()
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = options.devices or gpus or ["cpu", "cpu"]

    # 1. The inputs. Give the processes paths, not opened pictures: everything that they get is sent to them.
    images, left_out = list_images(options.folder, recursive=False)
    if not images:
        parser.error(f"there are no pictures in {options.folder}; check the path. {left_out}")
    if left_out:
        print(left_out)
    paths = [{"image": str(path)} for path in images]

    # 2. Processes on one CPU share its cores; without this, each would start a thread for every core.
    if "cpu" in devices:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))

    # 3. The model, and a process for each device, which loads the libraries once and then works until it is stopped.
    #    New processes run this file from its top, which is why the work is in `main`, behind the last two lines.
    #    `CocoaTransformer` opens every kind of picture in one way; `SentenceTransformer(folder)` drops transparency.
    folder = str(asset_path("checkpoints/cocoa-tiny")) if options.model == "tiny" else options.model
    model = SentenceTransformer(modules=[CocoaTransformer(folder)])
    pool = model.start_multi_process_pool(devices)

    # 4. Embed. The inputs go out in chunks, to whichever process is free; the vectors come back in order. `batch_size`
    #    is how many inputs a device takes at once. For a single call there is a shorter way, which starts and stops
    #    the processes by itself: `model.encode(paths, device=devices)`.
    try:
        vectors = model.encode(paths, pool=pool, batch_size=32, show_progress_bar=True)
    finally:
        model.stop_multi_process_pool(pool)
    np.save(options.output, vectors)
    options.output.with_suffix(".json").write_text(json.dumps([path.name for path in images]), encoding="utf-8")
    print(f"{len(vectors)} vectors by {len(devices)} processes ({', '.join(devices)}) in {options.output}.")

    # 5. The same as one process gives, but for the last digits of the numbers: batches are put together otherwise.
    few = model.encode(paths[:16], device=devices[0])
    print(f"One process gives the same to {np.abs(few - vectors[:16]).max():.0e}.")


if __name__ == "__main__":
    main()
