"""What only the kernel's own device mapper can tell; runs in a guest, see tests/uml."""
