"""Tasks: the problems, their data sources and their verifiers; and prompt samplers."""
