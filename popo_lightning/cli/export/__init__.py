"""`popo export` and `popo sample`: a trained policy as a transformers folder, and its answers to a prompt."""
