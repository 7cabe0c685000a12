"""Attention over pages: backends behind one signature, and which of them a machine uses."""
