"""Ranking against naive kornia pairs, and matches against true disparity."""
