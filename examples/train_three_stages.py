# SPDX-License-Identifier: Apache-2.0
"""
Train the three stages on your own pictures: warm-up, bridge, contrastive; then measure what came of it.

The folder holds the pictures and a file `metadata.csv` of the columns file_name and text, as for
examples/finetune_on_your_images.py, which has the last stage alone and is the one to begin with. Pre-training is for
many thousands of rows, and a model that is to learn more than your captions.

    python examples/train_three_stages.py my_pictures --output my_model

Stopped half-way? Call it again: it goes on from the last checkpoint. On a laptop, try it with the tiny model that
comes with the package: add `--model tiny --max-steps 20`. It has been through its contrastive stage, so that its
reconstruction heads are new ones; the log says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset

from cocoa import (
    CocoaContrastiveConfig,
    CocoaContrastiveTrainer,
    CocoaReconstructionConfig,
    CocoaReconstructionTrainer,
    asset_path,
)


def main() -> None:
    """Read the command line, train, and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your pictures and metadata.csv")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="what to start from, or 'tiny'")
    parser.add_argument("--output", type=Path, default=Path("my_model"), help="where checkpoints and models go")
    parser.add_argument("--max-steps", type=int, default=-1, help="steps of each stage; by default one epoch")
    options = parser.parse_args()
    is_tiny = options.model == "tiny"
    has_gpu = torch.cuda.is_available()
    model = str(asset_path("checkpoints/cocoa-tiny")) if is_tiny else options.model

    # 1. The data: pairs of a caption and its picture, which all three stages train on. One row in ten is put aside for
    #    the evaluation at the end; with the seed these are always the same rows.
    rows = load_dataset("imagefolder", data_dir=str(options.folder), split="train")
    rows = rows.rename_columns({"text": "query", "image": "positive"}).select_columns(["query", "positive"])
    pairs = rows.train_test_split(test_size=0.1, seed=0)

    # 2. What the stages have in common. A token of a picture is 28 x 28 pixels: pictures become 256 to 1,024 of them
    #    and keep their shape. The tiny model has sizes of its own. A checkpoint is written every 200 steps and at the
    #    end, and the last one kept.
    common = {
        "num_train_epochs": 1.0,
        "max_steps": options.max_steps,
        "bf16": has_gpu,
        "gradient_checkpointing": has_gpu,
        "save_steps": 200,
        "save_total_limit": 1,
        "report_to": "none",
        # A large model knows a lot already, and small steps keep it that way: the default is 2e-5.
        **({"learning_rate": 5e-4} if is_tiny else {}),
        **({} if is_tiny else {"min_pixels": 256 * 28 * 28, "max_pixels": 1024 * 28 * 28, "max_length": 1280}),
    }

    # 3. Stages 1 and 2, reconstruction. In the warm-up words and pixels of a pair are masked and rebuilt, by which the
    #    model learns to read in both directions. In the bridge, the caption is rebuilt through the last token of its
    #    picture alone: all of an input has to be gathered there. In the log, `eos_information_text` rises from about
    #    zero as it learns to. `resume_from_checkpoint=True` goes on from the last complete checkpoint, if there is
    #    one, and does nothing where the stage has ended.
    for stage in ("warmup", "bridge"):
        arguments = CocoaReconstructionConfig(
            str(options.output / stage), stage=stage, per_device_train_batch_size=8, **common
        )
        trainer = CocoaReconstructionTrainer(model, arguments, train_dataset=pairs["train"])
        trainer.train(resume_from_checkpoint=True)
        model = str(options.output / stage / "final")  # the next stage starts from it
        trainer.save_model(model)
        print(f"{stage}: {trainer.state.global_step} steps; the model is in {model}")

    # 4. Stage 3, contrastive: many pairs at once, and each caption is to find its own picture among all of them. The
    #    more at once, the better; `mini_batch_num_tokens` has them in the memory of so many tokens.
    arguments = CocoaContrastiveConfig(
        str(options.output / "contrastive"),
        per_device_train_batch_size=64 if is_tiny else 256,
        mini_batch_num_tokens=12_800,
        no_duplicates=True,
        evaluate_retrieval=True,
        **common,
    )
    trainer = CocoaContrastiveTrainer(model, arguments, train_dataset=pairs["train"], eval_dataset=pairs["test"])

    # 5. The evaluation: captions put aside search for their pictures, before this stage and after it. The saved folder
    #    holds the model for `SentenceTransformer`; examples/encode.py and the others take it as `--model`.
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=True)
    after = trainer.evaluate()
    trainer.save_model(str(options.output / "final"))
    recall = "eval_cosine_recall@10"
    print(f"contrastive: {trainer.state.global_step} steps")
    print(f"\nPictures put aside that their caption finds among the first ten of {len(pairs['test'])}:")
    print(f"{before[recall]:.0%} before, {after[recall]:.0%} after. The model is in {options.output / 'final'}.")


if __name__ == "__main__":
    main()
