"""Tests of popo_lightning/rollout."""
