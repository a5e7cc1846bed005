# SPDX-License-Identifier: Apache-2.0
"""`python -m cocoa`, as `accelerate launch -m cocoa` needs it."""

from .cli import app

app(prog_name="cocoa")
