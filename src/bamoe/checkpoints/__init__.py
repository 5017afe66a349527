"""Tensors on disk: reading, planning and writing them in bounded memory. Knows nothing about models."""
