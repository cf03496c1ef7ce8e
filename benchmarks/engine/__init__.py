"""How fast the engine is: swaps, sample-steps, and what the service adds to them."""
