"""Tasks: where problems come from and how an answer is verified."""
