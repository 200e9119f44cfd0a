"""The trained demo model: its question generator, its training script and its weights."""
