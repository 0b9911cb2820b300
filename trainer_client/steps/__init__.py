"""The steps of a trainer: what is open, its groups, what is said of it."""
