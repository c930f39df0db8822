"""Tests of popo_lightning/verifiers."""
