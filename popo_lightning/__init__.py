"""Off-policy reinforcement learning with verifiable rewards on Lightning, with group replay (POPO) at its centre."""

__version__ = "0.1.0"
