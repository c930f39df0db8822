"""Tests of popo_lightning/callbacks."""
