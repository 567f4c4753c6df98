"""containerd's messages: `setup.py` makes the modules from the .proto files beside them."""
