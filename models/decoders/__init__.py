"""Systems that change how the language model runs its layers."""
