"""Brings a reward model into memory: imports its class, makes an instance, keeps it, and says why it cannot."""
