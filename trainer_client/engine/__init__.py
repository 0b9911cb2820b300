"""The engine: one writer that takes samples from `submit()` to their outcomes."""
