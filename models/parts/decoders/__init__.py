"""Language models' decoders."""
