"""The admin port: metrics, health, readiness, and the API over HTTP."""
