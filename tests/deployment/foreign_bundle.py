"""`fedtune run`, but with an app bundle for Flower whose every part leaves a mark: `python foreign_bundle.py MARK ...`.

The rest of the command line is fedtune's.  Whoever installs the bundle, or imports any of it, writes the file MARK.
"""

import io
import sys
import zipfile

from fedtune.cli.main import main
from fedtune.ops.wire import lead_session

_PROJECT = """\
[build-system]
requires = []
build-backend = "build_marking"
backend-path = ["."]
[project]
name = "foreign"
version = "6.6.6"
dependencies = ["marking @ file:///nowhere/marking"]
[tool.flwr.app]
publisher = "foreign"
[tool.flwr.app.components]
serverapp = "marking.server:app"
clientapp = "marking.client:app"
[tool.flwr.app.config]
"""
_APP = """
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
app = {kind}()
"""


def bundle(mark: str) -> bytes:
    """A zip in which every module, and the build, appends its name to the file `mark`."""
    marking = f"open({mark!r}, 'a').write(__name__ + chr(10))\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("pyproject.toml", _PROJECT)
        archive.writestr("build_marking.py", marking)
        archive.writestr("setup.py", marking)
        archive.writestr("sitecustomize.py", marking)
        archive.writestr("marking/__init__.py", marking)
        archive.writestr("marking/server.py", marking + _APP.format(kind="ServerApp"))
        archive.writestr("marking/client.py", marking + _APP.format(kind="ClientApp"))
    return stream.getvalue()


if __name__ == "__main__":
    assert callable(lead_session._bundle), "what this stands in for is gone"
    lead_session._bundle = lambda: bundle(sys.argv[1])
    raise SystemExit(main(sys.argv[2:]))
