"""What the source of a user's reward class tells, read without importing it: it may need torch, or a GPU.

`files` finds and parses, `modules` and `lineage` follow names, `declared` reads what a class says of itself,
`class_names` whether it is there, `code` by which hash it is known.
"""
