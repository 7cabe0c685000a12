"""Fuzzing: `make fuzz`, or `python -m tests.fuzz --help`. Not collected by pytest; a short run of
what needs no further tool is tests/unit/test_fuzz.py. docs/security.md says what it looks for."""
