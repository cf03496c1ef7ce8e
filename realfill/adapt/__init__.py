"""Adapt the base to one scene: latent pool, loss, factors, probe and the training loop."""
