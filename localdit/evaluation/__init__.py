"""Benchmarks of text to image: their prompts, their pictures on disk, and scores."""
