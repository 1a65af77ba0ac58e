"""A fine-tuning run: its flags, its work, its parts and what it leaves behind."""
