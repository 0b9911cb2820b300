"""Fuzzers: each hands hostile or odd input to the real code, for as many seconds as it is given, and counts what came of
it. `make fuzz` runs all of them; short forms are in the suite."""
