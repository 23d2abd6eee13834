"""Judging what answers questions about pictures."""
