"""Systems that make pictures."""
