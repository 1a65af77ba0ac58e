"""One file a method, named by it, each with its ``scale_by_`` form."""
