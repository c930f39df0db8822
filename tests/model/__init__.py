"""Tests of popo_lightning/model."""
