"""How many bytes a state takes, and how they are changed."""
