"""How fast the registry is: publishing, resolving, listing, fetching, and MLflow beside it."""
