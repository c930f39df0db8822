"""``popo fit --plan``: estimates a run's memory, disk space and sizes before anything loads.

All of it is an estimate from the model's configuration. docs/plan.md explains each line.
"""
