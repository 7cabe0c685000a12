"""`nodeserve doctor`: facts are collected, judged by rules, and shown, each apart from the rest."""
