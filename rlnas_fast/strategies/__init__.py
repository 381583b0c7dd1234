"""Strategies: one file an algorithm.  Import the module you need; only those that use torch import it."""
