"""A Hub on the loopback interface: repositories in memory, the endpoints that uploads need."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code, X_Repo_Commit=COMMIT)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def repos(self):
        return self.server.repos

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        if path == "api/whoami-v2":
            return self.answer({"name": "tester", "type": "user", "orgs": []})
        if "/resolve/" in path:
            repo, rest = path.split("/resolve/")
            name = rest.split("/", 1)[1]
            if repo not in self.repos:
                return self.missing("RepoNotFound")
            if name not in self.repos[repo]:
                return self.missing("EntryNotFound")
            data = self.repos[repo][name]
            return self.answer(
                data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT
            )
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            if repo not in self.repos:
                return self.missing("RepoNotFound")
            files = [{"rfilename": name} for name in self.repos[repo]]
            return self.answer({"id": repo, "sha": COMMIT, "private": False, "siblings": files})
        return self.missing("EntryNotFound")

    def do_POST(self):
        path, data = self.path.split("?")[0].strip("/"), self.body()
        if path == "api/repos/create":
            asked = json.loads(data)
            repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
            self.repos.setdefault(repo, {})
            return self.answer({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(path.split("/")[2:4])
        if "/preupload/" in path:
            files = json.loads(data)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer({"files": modes})
        if "/commit/" in path:
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.repos[repo][entry["value"]["path"]] = content
            url = f"{self.server.url}/{repo}/commit/{COMMIT}"
            return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.missing("EntryNotFound")


@contextlib.contextmanager
def loopback_hub():
    """Serve an empty Hub; ``server.url`` is its endpoint, ``server.repos`` what it holds."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos = {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
