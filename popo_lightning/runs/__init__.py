"""A run's folder: its owner, where the run writes, what it resumes from, its checkpoints, and how it stops."""
