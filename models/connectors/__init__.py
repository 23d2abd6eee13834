"""Systems that are connectors: from vision tokens to decoder tokens."""
