"""Systems that encode several modalities."""
