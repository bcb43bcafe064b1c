"""Tests under `interpreted` run in processes of their own (`test_interpreted.py` starts them).

Triton decides at its import, by TRITON_INTERPRET, whether its functions are compiled or interpreted.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
