"""containerd's Snapshots service: our snapshots behind gRPC, for its proxy plugin."""
