"""Tests of popo_lightning/export."""
