"""Tests of popo_lightning/engines."""
