"""Several ranks of one trainer: one process for each, what they gather, the verdict they come to."""
