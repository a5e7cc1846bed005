# SPDX-License-Identifier: Apache-2.0
"""`cocoa serve`: one model over HTTP, with OpenAI's embeddings API."""
