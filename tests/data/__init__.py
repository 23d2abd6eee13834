"""Tests of data sets and the pipeline."""
