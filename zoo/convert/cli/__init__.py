"""`zoo convert`, `zoo export` and `zoo verify`: checkpoints in, out, and compared."""
