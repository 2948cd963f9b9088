"""A web server on the loopback interface for the time of a `with` block, with or without support for parts of files."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serve(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with a handler; yields "http://127.0.0.1:PORT"."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def files_of(folder: Path, ranges: bool = True) -> type[http.server.BaseHTTPRequestHandler]:
    """A handler for the files of a folder, which lists them at /, and answers 403 where there is none, as object stores do."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            name = self.path.partition("?")[0].strip("/")
            if name and not (folder / name).is_file():
                self.send_error(403)
                return
            listing = "".join(f'<a href="{path.name}">{path.name}</a>' for path in sorted(folder.iterdir()))
            data = (folder / name).read_bytes() if name else listing.encode()
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
            if match is not None:
                start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
                data = data[start : end + 1]
            else:
                self.send_response(200)
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/octet-stream" if name else "text/html")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object):
            pass

    return Handler
