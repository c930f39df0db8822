"""vLLM servers, started by the user: requests, answers, and weights sent through a folder."""
