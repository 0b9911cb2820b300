"""Judges behind an OpenAI-compatible API, one family a file."""
