"""The composer slot, the replay buffer, and the stores that methods share."""
