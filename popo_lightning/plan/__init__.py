"""``popo fit --plan``: what a run needs of a card, of a disk and of its numbers, before anything loads.

All of it is an estimate from the model's configuration. docs/plan.md says how each line comes about.
"""
