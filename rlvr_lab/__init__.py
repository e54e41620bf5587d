"""Entropy in reinforcement learning with verifiable rewards: methods, measurements and a real training loop."""

__version__ = "0.1.0"
