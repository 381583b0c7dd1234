"""The command ``rlnas``."""

from .main import main

__all__ = ["main"]
