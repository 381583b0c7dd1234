"""Ways to run evaluations: one after the other, or in worker processes.  Never imports torch."""
