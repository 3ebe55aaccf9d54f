"""The mathematics of BOOM: networks, losses, planner and how they are compiled. Imports torch and nothing else."""
