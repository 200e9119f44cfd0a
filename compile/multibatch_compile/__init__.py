"""Builds artifacts: a Hugging Face causal LM becomes a folder of decoders, one per batch size."""
