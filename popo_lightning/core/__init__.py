"""What every other room speaks of: problems, groups, minibatches, ranks, errors, clocks."""
