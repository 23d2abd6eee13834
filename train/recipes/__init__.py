"""Systems that are ways to train."""
