"""An open graph as commands use it: in this process, or at the daemon that holds it."""
