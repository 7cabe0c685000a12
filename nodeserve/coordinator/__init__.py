"""The coordinator process: see server.py for a node's life, coordinator.py for its decisions."""
