"""Durable memory of searches: the log of a run, and the cache of measurements between runs."""
