"""What Redis keeps of a run besides its outcomes."""
