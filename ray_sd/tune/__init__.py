"""Sweeps: Ray Tune around training runs."""
