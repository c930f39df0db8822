"""The centre of the trust region, and hooks around a method's parameters."""
