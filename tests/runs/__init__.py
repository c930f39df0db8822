"""Tests of popo_lightning/runs."""
