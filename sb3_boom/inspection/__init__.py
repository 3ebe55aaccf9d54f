"""One page that shows why a model does not learn: world model, critics, planner or policy."""

from sb3_boom.inspection.page import Inspection, inspect

__all__ = ["Inspection", "inspect"]
