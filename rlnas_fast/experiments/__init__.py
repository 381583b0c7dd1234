"""Published studies, run again with our parts."""
