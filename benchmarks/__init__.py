"""Measurements of the project; ``record.py`` keeps their rows."""
