"""Tests of popo_lightning/show."""
