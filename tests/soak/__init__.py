"""Faults again and again, at the times that users have; writes docs/reliability.md."""
