"""Whole models, composed from towers, connectors and decoders."""
