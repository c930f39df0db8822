"""Decides whether two written answers are equal: LaTeX, numbers, units, sets, regions, names."""
