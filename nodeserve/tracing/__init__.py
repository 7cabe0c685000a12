"""A node's trace: recorded over the client's socket, laid out in lanes, written for viewers."""
