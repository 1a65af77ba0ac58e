"""What a model is fine-tuned on: tasks, rows, batches and metrics."""
