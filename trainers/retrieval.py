# SPDX-License-Identifier: Apache-2.0
"""How well queries find their positives among all positives of a dataset, during training."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import transformers
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import SequentialEvaluator
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from evaluation.folder_report import FEW_QUERIES

from .data.content import content_key
from .data.contrastive_rows import prompts_of
from .data.rows import open_images, undecoded
from .tracking import SampledRetrieval

logger = logging.get_logger(__name__)

RANKS = (1, 5, 10)
"""The k of Recall@k; the last one is that of MRR and nDCG too."""


def retrieval_evaluator(
    datasets: Dataset | dict[str, Dataset],
    prompts: Any = None,
    batch_size: int = 32,
    image_size: tuple[int, int] | None = None,
    default_prompt: str | None = None,
) -> SequentialEvaluator:
    """
    sentence-transformers' retrieval evaluators, one a dataset: Recall@1, @5, @10, MRR@10 and nDCG@10 by its name.

    Queries that are the same, and positives that are the same, count as one, so a query may have several positives.
    The score of all together (`sequential_score`) is the mean of the datasets' nDCG@10. Warns of a dataset that is too
    small for its figures to mean anything.

    Args:
        datasets ([`~datasets.Dataset`] or a dict of them): With `query` and `positive`. Their images are held in
            memory as they are stored, not decoded.
        prompts (*optional*): One for all; or by column, by dataset, or by dataset and column.
        batch_size (`int`, defaults to 32): Of encoding.
        image_size (`tuple[int, int]`, *optional*): Width and height that images are stretched to.
        default_prompt (`str`, *optional*): Where `prompts` has none for a column; by default nothing is put in front.
    """
    parts = datasets if isinstance(datasets, dict) else {"": datasets}
    evaluators = []
    for name, dataset in parts.items():
        own = prompts_of(prompts, name)
        dataset = undecoded(dataset)
        queries: dict[str, Any] = {}
        corpus: dict[str, Any] = {}
        relevant: dict[str, set[str]] = {}
        for query, positive in zip(dataset["query"], dataset["positive"], strict=True):
            query_id, positive_id = content_key(query), content_key(positive)
            for found, key, cell in ((queries, query_id, query), (corpus, positive_id, positive)):
                if key not in found:
                    found[key] = open_images(cell, image_size)
            relevant.setdefault(query_id, set()).add(positive_id)
        if len(queries) < FEW_QUERIES:
            where = f" ({name})" if name else ""
            logger.warning(
                f"Held-out pairs{where}: only {len(dataset)}, so figures of retrieval mean little. "
                f"Queries: {len(queries)}; candidates: {len(corpus)}, of which chance finds {100 / len(corpus):.0f} % "
                f"first and {100 * min(1.0, RANKS[-1] / len(corpus)):.0f} % among the first {RANKS[-1]}. Hold out "
                f"{FEW_QUERIES} pairs or more."
            )
        evaluators.append(
            SampledRetrieval(
                queries,
                corpus,
                relevant,
                name=name,
                batch_size=batch_size,
                accuracy_at_k=[RANKS[0]],
                precision_recall_at_k=list(RANKS),
                mrr_at_k=[RANKS[-1]],
                ndcg_at_k=[RANKS[-1]],
                map_at_k=[RANKS[-1]],
                query_prompt=own.get("query", default_prompt or ""),  # None would be the model's own
                corpus_prompt=own.get("positive", default_prompt or ""),
            )
        )
    return SequentialEvaluator(evaluators, main_score_function=fmean)


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """
    transformers' own, which takes no notice of evaluations without its metric: the losses of one of several datasets,
    which come before the retrieval of all. transformers would warn each time that early stopping is disabled.
    """

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Count evaluations without improvement."""
        name = args.metric_for_best_model
        if (name if name.startswith("eval_") else f"eval_{name}") in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
