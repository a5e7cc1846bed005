# SPDX-License-Identifier: Apache-2.0
"""Training data in the forms that trainers read: rows, streams, collators, samplers."""
