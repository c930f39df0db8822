"""Tests of popo_lightning/grading."""
