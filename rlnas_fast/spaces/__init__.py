"""Search spaces, one file each: decisions, what is valid, and how to build the network."""
