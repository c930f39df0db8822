"""Tests of popo_lightning/plan."""
