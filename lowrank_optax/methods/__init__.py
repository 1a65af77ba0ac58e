"""The methods: one file each, with the optimizer and its ``scale_by_`` form."""
