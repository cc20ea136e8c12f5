"""How an action is written in a model's turn, and how it is read back."""
