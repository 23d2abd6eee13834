"""Fewer vision tokens: the form of the methods, and the functions that they share."""
