"""What Redis keeps of a run besides its outcomes: its rewards, and the code versions that answered them."""
