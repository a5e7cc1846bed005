# SPDX-License-Identifier: Apache-2.0
"""Models on the Hub: their cards, and what is checked before they are pushed."""

from .card_data import CocoaModelCardData, write_card

__all__ = ["CocoaModelCardData", "write_card"]
