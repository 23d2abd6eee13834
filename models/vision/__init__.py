"""Systems that are vision backbones."""
