"""Learning where in a network a non-local block does the most good."""
