"""What is trained: LLaMA and encoders, their weights on disk and their adapters."""
