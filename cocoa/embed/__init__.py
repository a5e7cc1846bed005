# SPDX-License-Identifier: Apache-2.0
"""Embed a collection of any size into a folder, and search it."""
