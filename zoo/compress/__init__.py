"""What makes a trained model smaller or faster, and what tells where that can be done."""
