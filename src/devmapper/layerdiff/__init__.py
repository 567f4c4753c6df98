"""Two directory trees become changes, changes a tar stream, and a tar stream changes a tree.

Pure file-system code: nothing here knows of layers' devices or of pools.  The modules to use are
`changes`, `archive`, `apply` and `copytree`.
"""
