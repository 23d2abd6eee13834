"""Systems that give the language model fewer vision tokens."""
