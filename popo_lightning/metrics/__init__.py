"""Estimators (avg@k, pass@k, ESS), the metric table on the disk, and which metrics a callback may monitor."""
