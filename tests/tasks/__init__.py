"""Tests of popo_lightning/tasks."""
