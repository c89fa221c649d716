"""Encode pictures and captions ahead of training: `python -m localdit.training.encode`."""
