"""Data sets, and what it means to do well on them."""
