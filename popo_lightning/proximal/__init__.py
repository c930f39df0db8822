"""The proximal policy (the center of the trust region), critic values, and hooks on the parameters."""
