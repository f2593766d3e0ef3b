"""A real RocketMQ without a cluster at hand, and the guided first run built on it."""
