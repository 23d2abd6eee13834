"""Checkpoints of other codes: read without running anything, converted, written back, compared."""
