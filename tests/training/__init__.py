"""Tests of popo_lightning/training."""
