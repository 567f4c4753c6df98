"""A real kernel with dm-thin as an ordinary process: User Mode Linux.

`guest` runs one command in a guest, `python -m tests.uml` does so for people, `plugin` runs the
tests of the kernel tier there and reports them on the host.
"""
