"""Where the text comes from, and how it becomes batches."""
