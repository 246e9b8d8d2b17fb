"""A retrieval service in a process of its own, for tests that need real sockets and signals."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit


class Served:
    def __init__(self, process, url):
        self.process, self.url = process, url
        self.address = (urlsplit(url).hostname, urlsplit(url).port)
        self.base = url.removesuffix("/retrieve")

    def connect(self, timeout=10):
        return socket.create_connection(self.address, timeout=timeout)


@contextmanager
def served(target="fake_retriever:OddRetriever", options=None, app=None, serve=None, child=False):
    """The service, with `child` true around a retriever in another process."""
    plan = {"target": target, "options": options or {}, "app": app or {}, "serve": serve or {}, "child": child}
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(plan)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *inherited])},
    )
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise AssertionError(process.communicate()[1])
        yield Served(process, url)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=30)
            finally:
                process.kill()
                process.wait()


def main():
    from retrievers.names import import_path
    from retrievers.service.process import ProcessRetriever
    from retrievers.service.server import make_app, serve

    plan = json.loads(sys.argv[1])
    if plan["child"]:
        retriever = ProcessRetriever(plan["target"], plan["options"])
    else:
        retriever = import_path(plan["target"])(**plan["options"])
    # What runs in a shell's background is started deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    serve(make_app(retriever, **plan["app"]), port=0, on_ready=lambda url: print(url, flush=True), **plan["serve"])


if __name__ == "__main__":
    main()
