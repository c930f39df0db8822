"""Which prompts to sample, which groups to keep, and which to train on."""
