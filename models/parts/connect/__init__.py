"""Connectors: from vision tokens to decoder tokens."""
