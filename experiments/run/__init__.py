"""What one run does: from its flags to its summary."""
