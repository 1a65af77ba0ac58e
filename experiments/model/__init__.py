"""What is trained: the LLaMA, its weights on disk and its adapters."""
