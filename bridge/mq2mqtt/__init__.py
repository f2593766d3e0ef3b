"""Bolt RocketMQ onto the MQTT broker you already run."""

__version__ = "0.1.0"

__all__ = ["__version__"]
