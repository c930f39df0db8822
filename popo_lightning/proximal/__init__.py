"""The proximal policy (the centre of the trust region), critic values, and hooks on the parameters."""
