"""The storage daemon: one graph, served to Docker, containerd, Prometheus and our own commands."""
