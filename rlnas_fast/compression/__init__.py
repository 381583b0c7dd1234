"""Learning which weights of a trained network to keep, prune, quantise or shuffle."""
