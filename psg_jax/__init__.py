"""Targeted machine unlearning by perturbed sign gradients, in JAX."""

__version__ = "0.1.0"
