"""Systems that are vision-language models."""
