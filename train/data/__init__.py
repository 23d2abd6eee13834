"""Data sets, and the pipeline that turns their records into batches."""
