"""Tests of popo_lightning/toys."""
