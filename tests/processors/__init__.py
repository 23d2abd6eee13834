"""Tests of what stands between pictures, text and a model."""
