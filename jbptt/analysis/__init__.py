"""Reads gradients: how far they reach, and what each truncation leaves of them."""
