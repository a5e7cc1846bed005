# SPDX-License-Identifier: Apache-2.0
"""The loss of stage 3: sentence-transformers' InfoNCE losses, put together as a configuration says."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor, nn

from modeling_cocoa.files import atomic_write

from .contrastive_config import SMALLEST_TEMPERATURE, CocoaContrastiveConfig
from .measuring import measuring

TEMPERATURE_FILE = "temperature.safetensors"
"""File of a checkpoint that holds a learned temperature, to go on from."""
TIE = 1e-6
"""Cosines that differ by less count as equal."""


OPTIONS = (
    "temperature",
    "learnable_temperature",
    "symmetric",
    "matryoshka_dims",
    "matryoshka_weights",
    "mini_batch_size",
    "mini_batch_num_tokens",
    "false_negative_margin",
    "teacher",
    "distillation_weight",
    "distillation_temperature",
)
"""Settings of the loss."""


def contrastive_loss(
    model: SentenceTransformer, args: CocoaContrastiveConfig, distillation: Distillation | None = None
) -> nn.Module:
    """
    InfoNCE of queries and targets, `-log(exp(s+ / t) / sum(exp(s / t)))` with cosines `s` (arXiv 1807.03748).

    `mini_batch_size` or `mini_batch_num_tokens` make it a cached one (GradCache, arXiv 2101.06983),
    `false_negative_margin` one that drops false negatives, with the model itself as the guide (GISTEmbed, arXiv
    2402.16829), `matryoshka_dims` one of several lengths of the vectors (arXiv 2205.13147).

    Args:
        model ([`~sentence_transformers.SentenceTransformer`]).
        args ([`CocoaContrastiveConfig`]).
        distillation ([`Distillation`], *optional*): What is added, at each length of the vectors.

    Raises:
        ValueError: `matryoshka_dims` lack the length of the model's vectors, or one is more than that.
    """
    cached = args.mini_batch_size is not None or args.mini_batch_num_tokens is not None
    options: dict[str, Any] = {"gather_across_devices": args.gather_across_devices}
    if args.mini_batch_size is not None:
        options["mini_batch_size"] = args.mini_batch_size
    if args.mini_batch_num_tokens is not None:
        options["mini_batch_num_tokens"] = args.mini_batch_num_tokens
    if args.false_negative_margin is not None:
        # Without its terms between queries and between targets it is InfoNCE, less the negatives that it drops. The
        # cached form always: the other takes one hard negative at most.
        options.update(guide=Guide(model), temperature=args.temperature, margin=args.false_negative_margin + TIE)
        loss = SelfGuidedLoss(model, contrast_anchors=False, contrast_positives=False, **options)
    else:
        options["scale"] = 1 / args.temperature
        if args.symmetric:
            options.update(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
        loss = (CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss)(model, **options)
    if distillation is not None:
        distillation.add_to(loss)
    if args.matryoshka_dims is not None:
        if (whole := model.get_embedding_dimension()) not in args.matryoshka_dims:
            raise ValueError(f"matryoshka_dims must include the full size, {whole}; got {args.matryoshka_dims}.")
        loss = MatryoshkaLoss(model, loss, args.matryoshka_dims, args.matryoshka_weights)
    if args.learnable_temperature:
        loss = LearnedTemperatureLoss(loss, args.temperature)
    return loss


def check_own_loss(args: CocoaContrastiveConfig, teacher: SentenceTransformer | None = None) -> None:
    """Raise `ValueError` where options or a teacher describe a loss, and another one was given."""
    if teacher is not None:
        raise ValueError("A teacher adds to the trainer's own loss, and another loss was given: leave one out.")
    if changed := [
        item.name for item in fields(args) if item.name in OPTIONS and getattr(args, item.name) != item.default
    ]:
        raise ValueError(f"{changed} describe the trainer's own loss, and another loss was given: set them there.")


class Distillation:
    """
    What makes the cosines of queries and documents within a batch follow those of a teacher.

    For the query of each row, `KL(softmax(teacher / t) || softmax(student / t))` over the positives and negatives of
    the batch, that is InfoNCE with the teacher's probabilities as soft labels, less their entropy. It is the
    contrastive relational distillation of CLIP-KD (arXiv 2307.12732), from queries to documents. Both have the same
    temperature, which is never the learned one of the contrastive loss: that would move the goal.
    `DistillKLDivLoss` takes a row's own candidates alone, and multiplies by `t ** 2`.

    Queries and documents without a vector of the teacher are left out; the sum of the rows is divided by all rows, so
    that any number of processes gives the gradients of one.

    Args:
        vectors (`Tensor` of shape `(inputs, teacher's hidden)`): Unit vectors, which labels of shape `(batch, columns,
            1)` number; -1 is no vector.
        args ([`CocoaContrastiveConfig`]): Of its `distillation_weight`, `distillation_temperature` (`temperature`
            where it is not set) and `gather_across_devices`.
    """

    def __init__(self, vectors: Tensor, args: CocoaContrastiveConfig) -> None:
        self.vectors = vectors
        self.args = args
        self.temperature = args.distillation_temperature or args.temperature
        self._labels: Tensor = torch.empty(0)
        self._terms: list[Tensor] = []

    def add_to(self, loss: nn.Module) -> None:
        """Add its part to one of sentence-transformers' in-batch losses, as `MatryoshkaLoss` changes them."""
        # Some losses do not hand the labels on to what computes them from vectors.
        loss.register_forward_pre_hook(lambda module, arguments: setattr(self, "_labels", arguments[1][..., 0]))
        name = "calculate_loss" if uses_gradient_cache(loss) else "compute_loss_from_embeddings"
        setattr(loss, name, partial(self._with_term, getattr(loss, name)))

    def take(self) -> Tensor:
        """The part without its weight since this was last called, the mean of all lengths of the vectors."""
        value = torch.stack(self._terms).mean()
        self._terms.clear()
        return value

    def __call__(self, columns: Sequence[Tensor], labels: Tensor) -> Tensor:
        """
        The divergence of a batch, without its weight.

        Args:
            columns (`Sequence[Tensor]`): The model's vectors of queries, positives and negatives, `(batch, hidden)`.
            labels (`Tensor` of shape `(batch, columns)`): Positions of the teacher's.
        """
        queries, *documents = (column.to(torch.promote_types(column.dtype, torch.float32)) for column in columns)
        all_labels = labels
        if self.args.gather_across_devices:
            documents, all_labels = [all_gather_with_grad(part) for part in documents], all_gather(labels)
        asked, candidates = labels[:, 0], all_labels[:, 1:].T.flatten()
        asked_known, known = asked >= 0, candidates >= 0
        teacher = [self.vectors[part.cpu()].to(queries) for part in (asked[asked_known], candidates[known])]
        with torch.autocast(queries.device.type, enabled=False):  # in bfloat16 cosines have three digits
            student = [nn.functional.normalize(part) for part in (queries[asked_known], torch.cat(documents)[known])]
            found, wanted = ((ask @ answer.T / self.temperature).log_softmax(1) for ask, answer in (student, teacher))
        return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True) / len(queries)

    def _with_term(self, calculate: Callable[..., Tensor], columns: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        """What `calculate` gives, and the part for the same vectors; mini-batches of them in a cached loss."""
        loss = calculate(columns, *args, **kwargs)
        whole = [column if isinstance(column, Tensor) else torch.cat(column) for column in columns]
        term = self(whole, self._labels)
        self._terms.append(term.detach())
        term = self.args.distillation_weight * term
        if kwargs.get("with_backward"):  # a cached loss makes its own, see LearnedTemperatureLoss
            term.backward()
            term = term.detach()
        return loss + term


class Guide(nn.Module):
    """
    A model as its own guide: without dropout, whose noise would hide that two targets are the same.

    Args:
        model ([`~sentence_transformers.SentenceTransformer`]).
    """

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.models = (model,)  # in a tuple, so that its weights are not those of the loss a second time

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.models[0].tokenizer

    @property
    def max_seq_length(self) -> int:
        """The model's."""
        return self.models[0].max_seq_length

    def forward(self, features: dict[str, Tensor]) -> dict[str, Any]:
        (model,) = self.models
        with measuring(model):
            return model(features)


class SelfGuidedLoss(CachedGISTEmbedLoss):
    """sentence-transformers' loss, in the memory of a matrix product."""

    def sim_matrix(self, embed1: Tensor, embed2: Tensor) -> Tensor:
        """Cosines of each with each, `(first, second)`; theirs has all pairs of vectors in memory at once."""
        return nn.functional.normalize(embed1, dim=-1) @ nn.functional.normalize(embed2, dim=-1).T


class LearnedTemperatureLoss(nn.Module):
    """
    A loss whose temperature is learned with the model, as in CLIP: the logarithm of `1 / temperature` is a parameter.

    Cached losses make their backward pass while they are computed, before anything that comes after them (division by
    accumulation steps) is known: so the temperature's gradient is taken there, and passed on through the result.

    Args:
        loss (`nn.Module`): What is computed.
        temperature (`float`): To begin with.
    """

    def __init__(self, loss: nn.Module, temperature: float) -> None:
        super().__init__()
        self.loss = loss
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.log_scale.register_hook(averaged)

    @property
    def model(self) -> nn.Module:
        """The model that the trainer gives to the loss."""
        return self.loss.model

    @property
    def inner(self) -> nn.Module:
        """The loss that has the temperature."""
        return self.loss.loss if isinstance(self.loss, MatryoshkaLoss) else self.loss

    @property
    def temperature(self) -> Tensor:
        """What cosines are divided by."""
        return (-self.log_scale).exp()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            self.log_scale.clamp_(max=-math.log(SMALLEST_TEMPERATURE))
        scale = self.log_scale.exp()
        cached = uses_gradient_cache(self.loss) and torch.is_grad_enabled()
        used = scale.detach().requires_grad_() if cached else scale
        self.inner.scale = used
        loss = self.loss(sentence_features, labels)
        return loss + (scale - scale.detach()) * used.grad if cached else loss

    def save(self, folder: str | os.PathLike) -> None:
        """Write the temperature into a checkpoint's folder."""
        with atomic_write(Path(folder) / TEMPERATURE_FILE) as file:
            save_file({"log_scale": self.log_scale.detach().cpu()}, file)

    def load(self, folder: str | os.PathLike) -> None:
        """
        Take the temperature from a checkpoint's folder.

        Raises:
            FileNotFoundError: it holds none.
        """
        with torch.no_grad():
            self.log_scale.copy_(load_file(Path(folder) / TEMPERATURE_FILE)["log_scale"])


def averaged(gradient: Tensor) -> Tensor:
    """The mean of a gradient over the processes that train together: the loss is outside of what DDP wraps."""
    if dist.is_available() and dist.is_initialized():
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient
