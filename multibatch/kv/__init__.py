"""The memory that all decoders of an artifact share: which block is whose, and where a token lies.

`allocator` and `block_table` are plain integers; tensors are made elsewhere.
"""
