"""The steps of a trainer: which are open, their groups, and what the log tells of them."""
