"""OpenAI's HTTP API in front of a running server: text, connections, keys; a client of its socket.

A gateway is a process of its own and holds no state that outlives a request, so there may be none,
one or several of them, and one that ends takes nothing but its own connections with it.
docs/gateway.md says what it accepts and what it answers.
"""
