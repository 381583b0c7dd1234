"""Mathematics of the strategies: pure functions on arrays, and policy networks."""
