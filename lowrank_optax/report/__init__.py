"""What an optimizer does, and what a state holds, for people."""
