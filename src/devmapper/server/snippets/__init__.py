"""What the other side has to be told so that it uses the daemon, and whether that works."""
