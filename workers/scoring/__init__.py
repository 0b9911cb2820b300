"""From a message to outcomes: read, claim, fetch, run, write once."""
