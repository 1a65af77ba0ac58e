"""For training loops: accumulation, non-finite gradients, and the like."""
