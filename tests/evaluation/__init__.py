"""Tests of popo_lightning/evaluation."""
