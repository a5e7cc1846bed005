# SPDX-License-Identifier: Apache-2.0
"""How the memory of a contrastive step grows with its pairs, with GradCache by tokens and without."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from modeling_cocoa import CocoaTransformer
from trainers.contrastive_config import CocoaContrastiveConfig
from trainers.contrastive_trainer import CocoaContrastiveTrainer

from .measure import PeakMemory
from .models import make_images, make_texts

PAIRS = (32, 256)
IMAGE_TOKENS = 256
MINI_BATCH_NUM_TOKENS = 4096


def bench_gradcache(folder: Path) -> dict[str, Any]:
    """
    Measure the peak memory of a step of texts and images of 256 tokens each, its collation included.

    Returns:
        `dict`: By number of pairs: peak, the collated pixels, and what is left of the peak without them, against 32
        pairs.
    """
    report: dict[str, Any] = {}
    for way, options in (
        (f"mini_batch_num_tokens={MINI_BATCH_NUM_TOKENS}", {"mini_batch_num_tokens": MINI_BATCH_NUM_TOKENS}),
        ("all at once", {"mini_batch_size": None}),
    ):
        rows: dict[str, dict[str, float]] = {}
        for pairs in PAIRS if "mini_batch_num_tokens" in options else PAIRS[:1]:
            peak, pixels = step_memory(folder, pairs, options)
            rest = peak - pixels
            first = next(iter(rows.values()), {"without them": rest})["without them"]
            rows[f"{pairs} pairs"] = {
                "peak MiB": peak,
                "pixels MiB": pixels,
                "without them": rest,
                f"against {PAIRS[0]} pairs": rest / first,
            }
        report[way] = rows
    return report


def step_memory(folder: Path, pairs: int, options: dict[str, Any]) -> tuple[float, float]:
    """The peak of one step above what there was before it, and the size of its pixels, in MiB."""
    module = CocoaTransformer(folder)
    vision = module.model.config.vision_config
    pixels = IMAGE_TOKENS * (vision.patch_size * vision.spatial_merge_size) ** 2
    with TemporaryDirectory() as scratch:
        args = CocoaContrastiveConfig(
            scratch,
            per_device_train_batch_size=pairs,
            report_to="none",
            disable_tqdm=True,
            check_data=False,
            **options,
        )
        module.processor = type(module.processor)(module.processor.processor, min_pixels=pixels, max_pixels=pixels)
        rows = Dataset.from_dict({"query": make_texts(pairs, 5, 30), "positive": make_images(pairs)})
        trainer = CocoaContrastiveTrainer(module.model, args, train_dataset=rows, processing_class=module.processor)
        trainer.model.train()

        def step(count: int) -> float:
            batch = trainer.data_collator([trainer.train_dataset[row] for row in range(count)])
            size = sum(value.nbytes for name, value in batch.items() if name.endswith("pixel_values"))
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
            return size / 2**20

        step(8)  # gradients are there from now on, and oneDNN's kernels
        with PeakMemory() as memory:
            size = step(pairs)
    return memory.mib, size
