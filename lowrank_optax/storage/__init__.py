"""The bytes of a state, and how to change them."""
