"""Reports for people: an optimizer's decisions, and the contents of a state."""
