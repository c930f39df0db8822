"""`popo estimate`: accuracy from logged responses (importance sampling, STAR), and effects by a randomized hint."""
