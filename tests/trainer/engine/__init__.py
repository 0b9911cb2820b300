"""The trainer's engine: its policies one by one, its state on a clock that tests move, its loop with real threads."""
