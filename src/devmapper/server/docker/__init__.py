"""Docker's graphdriver plugin: the graph driver over HTTP on a unix socket."""
