"""Snapshots as containerd means them: named, labelled layers that somebody else mounts."""
