"""Gradient-based meta-learning in JAX."""
