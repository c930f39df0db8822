"""Tests of files beside the package: examples, scripts, docs, packaging."""
