"""The daemon to Prometheus: `/metrics` and `/healthz`."""
