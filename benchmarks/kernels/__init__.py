"""How fast the kernels are: each op beside torch, and beside what the machine can do."""
