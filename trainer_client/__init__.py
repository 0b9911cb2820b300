"""The trainer side: submit samples, collect rewards."""
