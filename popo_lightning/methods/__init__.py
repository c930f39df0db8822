"""One file per paper: everything that a published method adds to the general slots."""
