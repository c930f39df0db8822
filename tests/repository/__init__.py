"""Tests of what lies beside the package: examples, scripts, docs, packaging."""
