"""Layers, and the stack that runs them."""
