# SPDX-License-Identifier: Apache-2.0
"""
Teach a model your own pictures: from a folder of them, with a caption each, to a checkpoint that searches them.

The folder holds the pictures and a file `metadata.csv`:

    file_name,text
    beach.jpg,two children on a beach at sunset
    harbour.jpg,fishing boats in the harbour of Aberdeen

Then:

    python examples/finetune_on_your_images.py my_pictures --query "boats at sea"

On a laptop, try it with the tiny model that comes with the package: add `--model tiny`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Image, load_dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from cocoa import CocoaContrastiveConfig, CocoaContrastiveTrainer, asset_path, load_image


def main() -> None:
    """Read the command line, train, and search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="your pictures and metadata.csv")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="what to start from, or 'tiny'")
    parser.add_argument("--output", type=Path, default=Path("my_model"), help="where the new model goes")
    parser.add_argument("--epochs", type=float, default=3.0, help="how often every picture is seen")
    parser.add_argument("--query", default="a picture of a cat", help="what to search for at the end")
    options = parser.parse_args()
    is_tiny = options.model == "tiny"
    has_gpu = torch.cuda.is_available()

    # 1. The data. Every row is a picture and its caption. One row in ten is put aside: the model never trains on it,
    #    so that it shows whether the model has learned something or only remembers. With the seed these are always the
    #    same rows.
    if not (options.folder / "metadata.csv").is_file():
        parser.error(f"there is no {options.folder / 'metadata.csv'}: write one with the columns file_name and text.")
    rows = load_dataset("imagefolder", data_dir=str(options.folder), split="train")
    rows = rows.rename_columns({"text": "query", "image": "positive"}).select_columns(["query", "positive"])
    parts = rows.train_test_split(test_size=0.1, seed=0)

    # 2. How to train. Contrastive training shows the model many pairs at once and asks which caption belongs to which
    #    picture: the more pairs at once, the harder the question and the better the model. `mini_batch_num_tokens`
    #    keeps the memory small all the same: lower it when the GPU's memory does not suffice.
    arguments = CocoaContrastiveConfig(
        output_dir=str(options.output / "training"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        mini_batch_num_tokens=4096,
        learning_rate=1e-4,  # a model knows something already, and small steps keep it that way
        **({"temperature": 0.1} if is_tiny else {}),  # as it was trained with: with another it would forget
        bf16=has_gpu,
        gradient_checkpointing=has_gpu,
        max_pixels=None if is_tiny else 512 * 28 * 28,  # larger pictures are made smaller: 512 tokens at most
        no_duplicates=True,  # the same caption twice in a batch would be a question with two right answers
        # After each epoch the captions put aside search for their pictures. The checkpoint that did best is kept, and
        # training ends when two epochs in a row were no better.
        evaluate_retrieval=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_sequential_score",
        early_stopping_patience=2,
        report_to="none",
    )

    # 3. What to train. LoRA leaves the model as it is and learns small additions to it: that needs far less memory,
    #    and suits a few hundred or thousand pictures. They are folded in when the model is saved.
    adapters = None if is_tiny else LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
    trainer = CocoaContrastiveTrainer(
        str(asset_path("checkpoints/cocoa-tiny")) if is_tiny else options.model,
        arguments,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        peft_config=adapters,
    )

    # 4. Train. Stopped half-way? Call the script again: it goes on from the last checkpoint.
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=True)
    after = trainer.evaluate()
    trainer.save_model(str(options.output / "final"))
    recall = "eval_cosine_recall@10"
    print(f"\nPictures put aside that their caption finds among the first ten of {len(parts['test'])}:")
    print(f"{before[recall]:.0%} before, {after[recall]:.0%} after. The model is in {options.output / 'final'}.\n")

    # 5. Search. This part is all that an application needs: a vector for each picture, once, and one for each
    #    question.
    model = SentenceTransformer(str(options.output / "final"))
    cells = rows.cast_column("positive", Image(decode=False))["positive"]
    pictures = model.encode([load_image(cell) for cell in cells])
    scores = model.similarity(model.encode([{"text": options.query}]), pictures)[0]
    print(f"For {options.query!r}:")
    for score, place in zip(*(value.tolist() for value in scores.topk(min(3, len(rows)))), strict=True):
        print(f"  {score:.2f}  {rows[place]['query']}")


if __name__ == "__main__":
    main()
