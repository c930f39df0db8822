"""Tests of popo_lightning/objectives."""
