"""Runs models: tasks and training."""
