"""How long a wait may last that only ends a broken test, whatever else the machine does."""

PATIENCE_S = 200.0
