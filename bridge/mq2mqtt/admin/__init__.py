"""The admin port: metrics, health and readiness over HTTP."""
