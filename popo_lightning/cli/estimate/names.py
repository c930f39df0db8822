"""Names and defaults that the command line shows, free of numpy so that --help is answered at once."""

LARGEST_WEIGHT = 5.0
"""Maximum weight of a response in the clipped estimate."""

POSITION, CONFIDENCE, TIME, ONE = "position", "confidence", "time", "one"
"""Abstractions of STAR."""
