"""One file a paper: everything that a published method adds to the general slots."""
