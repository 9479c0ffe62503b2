"""Training runs: Ray Train around DeepSpeed."""
