"""What trains it: the optimizers by name, their flags and how they are put together."""
