"""Trainer side of frameworks, one file each."""
