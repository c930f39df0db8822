"""Do two written answers say the same? LaTeX, numbers, units, sets, regions, names."""
