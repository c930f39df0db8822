"""Tests of popo_lightning/cli."""
