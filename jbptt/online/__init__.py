"""Gradients that run forward with the sequence: no pass back through time."""
