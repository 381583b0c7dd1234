"""Lets the tests of operators import what they share, which lies beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("nonlocal_attention_checks", "triton_compile")
