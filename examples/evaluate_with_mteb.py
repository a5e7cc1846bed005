# SPDX-License-Identifier: Apache-2.0
"""
Score a CoCoA checkpoint in mteb (`pip install mteb`, Python 3.11 or newer), on its tasks or on your own pictures.

A saved checkpoint needs no code of ours there: mteb loads it with sentence-transformers. This script says who the
model is, which a result on mteb's leaderboard needs, and makes a task of a folder of pictures with a `metadata.csv` of
the columns file_name and text: each text is to find its picture.

mteb keeps results by the names of task and model and the model's revision, and does not measure again what it finds
there. So the revision is made from the model's weights and settings, and the task's name from the folder's files.

    python examples/evaluate_with_mteb.py --model my_model/final --pictures my_pictures
    python examples/evaluate_with_mteb.py --model my_model/final --task Flickr30kT2IRetrieval
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mteb
from datasets import load_dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from cocoa import asset_path, digest_files, fingerprint


class PicturesByText(AbsTaskRetrieval):
    """Texts that search pictures; a folder of your own has a class of its own, which [`pictures_by_text`] makes."""

    metadata = TaskMetadata(
        name="PicturesByText",
        description="Each caption finds its picture.",
        type="Any2AnyRetrieval",
        category="t2i",
        modalities=["text", "image"],
        main_score="ndcg_at_10",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        dataset={"path": "local", "revision": "of a folder"},
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )

    folder: Path

    def load_data(self, **options: Any) -> None:
        """The folder's pictures, and their texts as queries; mteb calls this."""
        rows = load_dataset("imagefolder", data_dir=str(self.folder), split="train")
        names = [str(row) for row in range(len(rows))]
        texts, pictures = rows.select_columns(["text"]), rows.select_columns(["image"])
        split = RetrievalSplitData(
            queries=texts.add_column("id", names),
            corpus=pictures.add_column("id", names),
            relevant_docs={name: {name: 1} for name in names},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def pictures_by_text(folder: Path) -> PicturesByText:
    """
    The task of a folder of pictures; one with other files is another task.

    Args:
        folder (`Path`): With a `metadata.csv`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    revision = digest_files(files, folder)
    changes = {"name": f"PicturesByText-{revision[:8]}", "dataset": {"path": "local", "revision": revision}}
    metadata = PicturesByText.metadata.model_copy(update=changes)
    return type("PicturesByText", (PicturesByText,), {"metadata": metadata, "folder": folder})()


def describe(folder: str, name: str) -> ModelMeta:
    """
    Who a checkpoint is, as mteb asks it, and how it is loaded.

    Args:
        folder (`str`): Folder or Hub name.
        name (`str`): What results call it, as `organization/model`.
    """

    def load(model_name: str, revision: str | None = None, device: str | None = None, **options: Any) -> Any:
        return SentenceTransformerEncoderWrapper(SentenceTransformer(folder, device=device), revision=revision)

    model = SentenceTransformer(folder, device="cpu")
    return ModelMeta(
        loader=load,
        name=name,
        revision=fingerprint(model)[:16],  # for mteb's leaderboard: the commit on the Hub
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory_usage_mb=round(sum(value.numel() * value.element_size() for value in model.parameters()) / 2**20),
        max_tokens=model.max_seq_length,
        embed_dim=model.get_embedding_dimension(),
        license="apache-2.0",
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["Sentence Transformers", "PyTorch", "safetensors"],
        similarity_fn_name="cosine",
        use_instructions=False,
        training_datasets=None,
        modalities=["text", "image"],
    )


def main() -> None:
    """Read the command line, evaluate, and print the main score of each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder or Hub name of a checkpoint, or 'tiny'")
    parser.add_argument("--name", default="my-organization/cocoa", help="what results call it")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures with metadata.csv")
    parser.add_argument("--task", action="append", default=[], help="a task of mteb; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("mteb_results"), help="where results go")
    options = parser.parse_args()
    tasks = [*mteb.get_tasks(tasks=options.task)] if options.task else []
    if options.pictures:
        tasks.append(pictures_by_text(options.pictures))
    if not tasks:
        parser.error("give --pictures or --task")
    model = str(asset_path("checkpoints/cocoa-tiny")) if options.model == "tiny" else options.model
    results = mteb.evaluate(
        describe(model, options.name), tasks, cache=mteb.ResultCache(options.output), show_progress_bar=False
    )
    names = {task.metadata.name: task.metadata.main_score for task in tasks}
    for result in results.task_results:
        print(f"{result.task_name}: {names[result.task_name]} {100 * result.get_score():.2f}")


if __name__ == "__main__":
    main()
