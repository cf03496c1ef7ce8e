"""What training a scene costs, beside the public script and beside training without a pool."""
