"""Systems that are heads of dense prediction."""
