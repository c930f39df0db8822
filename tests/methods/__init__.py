"""Tests of popo_lightning/methods."""
