"""From a trained model to a robot: export to ONNX, and an agent that needs numpy and onnxruntime alone."""

from sb3_boom.deployment.agent import Agent

__all__ = ["Agent"]
