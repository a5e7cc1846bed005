# SPDX-License-Identifier: Apache-2.0
"""From the last layer's hidden states to one unit vector an item."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def last_token_indices(attention_mask: Tensor) -> Tensor:
    """
    Index of each row's last token that is not padding, whichever side the padding is on.

    Args:
        attention_mask (`Tensor` of shape `(batch, tokens)`): 1 for tokens, 0 for padding.

    Returns:
        `Tensor` of shape `(batch,)`, int64.

    Raises:
        ValueError: a row is padding only; names the row.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    indices = torch.where(attention_mask.bool(), positions, -1).max(dim=1).values
    if (indices < 0).any():
        row = int((indices < 0).nonzero()[0])
        raise ValueError(f"Row {row} of the batch is padding only: every input must hold at least the EOS token.")
    return indices


class EosPooler(nn.Module):
    """
    The embedding of an input: the final hidden state at its EOS, L2-normalised (CoCoA, arXiv 2603.01471).

    Args:
        eos_token_id (`int`): The token that must close every row.
    """

    def __init__(self, eos_token_id: int) -> None:
        super().__init__()
        self.eos_token_id = eos_token_id

    def check(self, last_tokens: Tensor) -> None:
        """
        Check that rows end in the EOS.

        Args:
            last_tokens (`Tensor` of shape `(batch,)`): Each row's last token that is not padding.

        Raises:
            ValueError: one does not; names the row.
        """
        wrong = last_tokens != self.eos_token_id
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"Row {row} of the batch ends in token {int(last_tokens[row])}, not in the EOS ({self.eos_token_id}). "
                "Build inputs with CocoaProcessor, or end them with the EOS yourself."
            )

    def forward(
        self, last_hidden_state: Tensor, attention_mask: Tensor | None = None, input_ids: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            last_hidden_state (`Tensor` of shape `(batch, tokens, hidden)`): After the model's last norm.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*): 1 for tokens, 0 for padding on either
                side; all ones where it is not given.
            input_ids (`Tensor` of shape `(batch, tokens)`, *optional*): Checked to end in the EOS; without them (a
                caller that has only `inputs_embeds`) the last token is taken on trust.

        Returns:
            `Tensor` of shape `(batch, hidden)`: unit vectors.

        Raises:
            ValueError: a row's last token is not the EOS, or a row is padding only; names the row.
        """
        if attention_mask is None:
            attention_mask = last_hidden_state.new_ones(last_hidden_state.shape[:2])
        indices = last_token_indices(attention_mask)
        rows = torch.arange(indices.shape[0], device=indices.device)
        if input_ids is not None:
            self.check(input_ids[rows, indices])
        return nn.functional.normalize(last_hidden_state[rows, indices], dim=-1)

    def extra_repr(self) -> str:
        return f"eos_token_id={self.eos_token_id}"
