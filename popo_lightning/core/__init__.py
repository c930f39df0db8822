"""Shared concepts of all rooms: problems, groups, minibatches, ranks, errors, clocks."""
