"""Train a grid of tasks, variants and seeds, and report it beside published results: ``sb3-boom benchmark``."""
