"""One iteration's rollouts: generation, grading, weight sync, asynchronous generation, and state in checkpoints."""
