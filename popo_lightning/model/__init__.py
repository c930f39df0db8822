"""The language model: loading, prompts, packed forward passes, log-probs, sharding over ranks, the critic."""
