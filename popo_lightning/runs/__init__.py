"""A run's folder: who owns it, where it starts, what it goes on from, its checkpoints, how it stops."""
