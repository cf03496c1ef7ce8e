"""Operations with a definition in torch and a Triton kernel beside it; one folder each.

Nothing is imported here: transformers looks for a package of this name and must find an empty one.
"""
