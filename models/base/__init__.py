"""The models that the systems start from: one file for each architecture of the Hugging Face hub.

A file holds the published sizes, the reader of the architecture's `config.json`, and the key tables
of its checkpoints. The modules themselves are in `zoo.models.parts`.
"""
