"""Our own commands at the daemon: JSON over HTTP on a unix socket."""
