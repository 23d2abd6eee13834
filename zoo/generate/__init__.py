"""Producing answers: one module for each way of decoding, and the command `zoo generate`."""
