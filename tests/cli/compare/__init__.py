"""Tests of popo_lightning/compare."""
