"""Makes the modules of containerd's messages from their .proto files, in every kind of build.

All else stands in pyproject.toml.
"""

from importlib import resources
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCES = Path("src")
PROTOS = "devmapper/server/containerd/api/*.proto"


def generate() -> None:
    """`x_pb2.py` for Python and `x_pb2.pyi` for mypy, beside each `x.proto`."""
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    names = [str(path) for path in sorted(SOURCES.glob(PROTOS))]
    arguments = [f"-I{SOURCES}", f"-I{well_known}", f"--python_out={SOURCES}"]
    if protoc.main(["protoc", *arguments, f"--pyi_out={SOURCES}", *names]) != 0:
        raise SystemExit("protoc failed")


class BuildWithMessages(build_py):
    """Also runs for an editable installation, which imports from the source tree itself."""

    def run(self) -> None:
        generate()
        super().run()


setup(cmdclass={"build_py": BuildWithMessages})
