"""How many runs are compared: what is tried, what is recorded and what it says."""
