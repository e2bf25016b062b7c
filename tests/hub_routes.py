"""The routes of the local Hub (local_hub.py, which says what is not checked): what is asked, what is answered."""

import base64
import hashlib
import json
import re
import secrets
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_records import REGULAR_LIMIT, HubError, describe, hex_id, history, is_lfs, prefix, sibling, tree_entries

INVALID_TOKEN = "Invalid credentials in Authorization header"
NOT_LOGGED_IN = "Invalid username or password."
NOT_GRANTED = "Access to {} is restricted and you are not in the authorized list. Visit {} to ask for access."
NO_WRITE = (None, "Forbidden: you must use a write token to upload to a repository.", {})
JSON = {"Content-Type": "application/json; charset=utf-8"}
CREATED = "2025-01-01T00:00:00.000Z"

ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<type>model|dataset|space)s/{ID}"
FILE = rf"/(?:(?P<type>dataset|space)s/)?{ID}"
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/(?P<type>model|dataset|space)s", "search"),
    ("GET", rf"{API}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", rf"{API}/refs", "refs"),
    ("GET", rf"{API}/discussions", "discussions"),
    ("GET", rf"{API}/commits/{REV}", "log"),
    ("GET", rf"{API}/tree/{REV}(?:/(?P<path>.*))?", "tree"),
    ("POST", rf"{API}/paths-info/{REV}", "paths_info"),
    ("POST", rf"{API}/preupload/{REV}", "preupload"),
    ("POST", rf"{API}/commit/{REV}", "commit"),
    ("POST DELETE", rf"{API}/(?P<kind>branch|tag)/{REV}", "ref"),
    ("GET", rf"{API}(?:/revision/{REV})?", "info"),
    ("POST", rf"{FILE}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<sha>[0-9a-f]{64})", "lfs_upload"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("GET", r"/lfs/(?P<sha>[0-9a-f]{64})/(?P<path>.+)", "lfs_content"),
    ("GET", rf"{FILE}/resolve/{REV}/(?P<path>.+)", "resolve"),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def process_request(self, request, address):
        with self.hub.lock:
            self.hub.connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        with self.hub.lock:
            self.hub.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that hung up
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go as two writes

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.hub, self.body, url = self.server.hub, self.read_body(), urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
        try:
            self.planned_fault(self.hub.fault(f"{self.command} {self.path}"))
            with self.hub.lock:
                answer = self.route(url.path)
            answer()
        except HubError as error:
            self.answer_error(error)
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def route(self, path):
        """A function that sends the answer, to be called without the lock; or HubError."""
        self.token = self.read_token(path)
        for methods, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command.replace("HEAD", "GET") in methods.split():
                asked = {key: value and unquote(value) for key, value in found.groupdict().items()}
                if "id" in asked:
                    asked["type"] = asked["type"] or "model"
                return getattr(self, name)(**asked)
        raise HubError(404, None, f"The local Hub has no route {self.command} {path}")

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def json_body(self):
        form = "json" not in self.headers.get("Content-Type", "")
        return parse_qs(self.body.decode()) if form else json.loads(self.body or b"{}")

    def planned_fault(self, kind):
        if kind is None:
            return
        if kind == "drop":
            raise ConnectionAbortedError
        file, reads = "/resolve/" in self.path, self.command in ("GET", "HEAD")
        code, message, headers = {
            401: (None, INVALID_TOKEN, {}),
            403: ("GatedRepo", NOT_GRANTED.format("this repository", self.hub.endpoint), {}) if reads else NO_WRITE,
            404: ("EntryNotFound", "Entry not found", {}) if file else ("RepoNotFound", "Repository not found", {}),
            429: (None, "We had to rate limit you.", {"Retry-After": "1"}),
        }.get(kind, (None, "Internal Error - We're working hard to fix this as soon as possible!", {}))
        raise HubError(kind, code, message, headers)

    # Who asks, and what they may do.

    def read_token(self, path):
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and path.startswith("/lfs/") and path != "/lfs/verify":  # as storage does behind signed addresses
            raise HubError(400, None, "Only one auth mechanism allowed")
        if given and given not in self.hub.tokens:
            raise HubError(401, None, INVALID_TOKEN)
        return self.hub.tokens.get(given)

    def sees(self, repo):
        return not repo.private or bool(self.token and self.token.may(False, repo.id, repo.type))

    def repo(self, id, type):
        """The repository, if whoever asks may know that it exists."""
        repo = self.hub.repos.get((type, id))
        if repo is None or not self.sees(repo):
            if self.token is None:  # who is not logged in is not told missing from private
                raise HubError(401, "RepoNotFound", NOT_LOGGED_IN)
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    def check_gate(self, repo):
        """Raises unless the files of a gated repository are open to whoever asks."""
        if not repo.gated:
            return
        name = f"{repo.type} {repo.id}"
        if self.token is None:
            message = f"Access to {name} is restricted. You must have access to it and be authenticated to access it."
            raise HubError(401, "GatedRepo", f"{message} Please log in.")
        if not repo.granted.union([repo.owner]).intersection([self.token.user, *self.token.orgs]):
            raise HubError(403, "GatedRepo", NOT_GRANTED.format(name, f"{self.hub.endpoint}/{prefix(repo)}"))

    def writable(self, id, type):
        """The repository, if whoever asks may write to it."""
        repo = self.repo(id, type)
        if self.token is None:
            raise HubError(401, "RepoNotFound", NOT_LOGGED_IN)
        if not self.token.may(True, id, type):
            raise HubError(403, *NO_WRITE)
        return repo

    # Routes: accounts and repositories.

    def whoami(self):
        if self.token is None:
            raise HubError(401, None, NOT_LOGGED_IN)
        user, access = self.token.user, {"displayName": "test", "role": self.token.role, "createdAt": CREATED}
        if self.token.role == "fineGrained":
            scoped = []
            for scope, permissions in self.token.scopes.items():
                kind, name = scope.split(":", 1)
                entity = {"_id": hex_id(scope), "type": kind, "name": name}
                scoped.append({"entity": entity, "permissions": list(permissions)})
            access["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        orgs = []
        for name, role in self.token.orgs.items():
            orgs.append({"type": "org", "id": hex_id(name), "name": name, "fullname": name, "roleInOrg": role})
        answer = {"type": "user", "id": hex_id(user), "name": user, "fullname": user, "isPro": False, "orgs": orgs}
        return self.json(answer | {"auth": {"type": "access_token", "accessToken": access}})

    def create(self):
        if self.token is None:
            raise HubError(401, None, NOT_LOGGED_IN)
        wanted = self.json_body()
        owner, type = wanted.get("organization") or self.token.user, wanted.get("type", "model")
        id = f"{owner}/{wanted['name']}"
        if not self.token.may(True, id, type):
            message = f'You don\'t have the rights to create a {type} under the namespace "{owner}"'
            raise HubError(403, None, message)
        known = (type, id) in self.hub.repos
        if not known:
            self.hub.add_repo(id, {}, type, private=wanted.get("visibility") == "private")
        answer = {"url": f"{self.hub.endpoint}/{prefix(self.hub.repos[type, id])}", "name": id, "id": hex_id(id)}
        if known:
            raise HubError(409, None, f"You already created this {type} repo", body=answer)
        return self.json(answer)

    def delete(self):
        wanted = self.json_body()
        type, owner = wanted.get("type", "model"), wanted.get("organization") or getattr(self.token, "user", None)
        repo = self.writable(f"{owner}/{wanted['name']}", type)
        del self.hub.repos[type, repo.id]
        return self.json({})

    def validate_yaml(self):
        return self.json({"errors": [], "warnings": []})

    def search(self, type):
        words, author = self.query.get("search", "").lower().split(), self.query.get("author")
        repos = [r for r in self.hub.repos.values() if r.type == type and self.sees(r) and author in (None, r.owner)]
        found = [r for r in repos if all(word in r.id.lower() for word in words)][: int(self.query.get("limit", 1000))]
        return self.json([describe(repo, repo.commit("main")) for repo in found])

    def auth_check(self, id, type, write):
        if write:
            self.writable(id, type)
        else:
            self.check_gate(self.repo(id, type))
        return self.json({})

    def info(self, id, type, rev):
        repo = self.repo(id, type)
        commit = repo.commit(rev or "main")
        blobs = self.query.get("blobs", "").lower() == "true"
        siblings = [sibling(path, file, blobs) for path, file in commit.files.items()]
        return self.json(describe(repo, commit) | {"siblings": siblings})

    def refs(self, id, type):
        repo, answer = self.repo(id, type), {"converts": []}
        for name, where, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags)):
            answer[name] = [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": sha} for n, sha in refs.items()]
        return self.json(answer)

    def ref(self, id, type, kind, rev):
        """Makes or deletes the branch `rev`; makes a tag on the revision `rev` or deletes the tag `rev`."""
        repo = self.writable(id, type)
        refs = repo.branches if kind == "branch" else repo.tags
        if self.command == "DELETE":
            if refs.pop(rev, None) is None:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
            return self.json({})
        wanted = self.json_body()
        name, start = (rev, wanted.get("startingPoint", "main")) if kind == "branch" else (wanted["tag"], rev)
        if name in refs:
            raise HubError(409, None, f"Reference already exists: {name}")
        refs[name] = repo.commit(start).sha
        return self.json({})

    def discussions(self, id, type):
        self.repo(id, type)
        return self.json({"discussions": [], "count": 0, "start": 0})

    # Routes: what is in a repository.

    def log(self, id, type, rev):
        commits = history(self.repo(id, type), rev)
        listed = [{"id": c.sha, "title": c.message, "message": "", "date": c.date, "authors": []} for c in commits]
        return self.json(listed)

    def tree(self, id, type, rev, path):
        commit, root = self.repo(id, type).commit(rev), f"{path}/" if path else ""
        entries = {p: entry for p, entry in tree_entries(commit).items() if p.startswith(root)}
        if not entries and path:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {rev!r}", {"X-Repo-Commit": commit.sha})
        deep = self.query.get("recursive", "").lower() == "true"
        return self.json([entry for p, entry in entries.items() if deep or "/" not in p.removeprefix(root)])

    def paths_info(self, id, type, rev):
        entries = tree_entries(self.repo(id, type).commit(rev))
        paths = [path.strip("/") for path in self.json_body().get("paths", [])]
        return self.json([entries[path] for path in paths if path in entries])

    def resolve(self, id, type, rev, path):
        repo = self.repo(id, type)
        self.check_gate(repo)
        commit = repo.commit(rev)
        headers, file = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if file is None:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        if not file.lfs:
            return self.content(file.sha256, file.oid, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"{self.hub.storage}/lfs/{file.sha256}/{quote(path)}"
        return partial(self.send, 302, b"", headers)

    def lfs_content(self, sha, path):
        if not (self.hub.folder / sha).exists():
            raise HubError(404, None, "No such object")
        return self.content(sha, sha, {})

    def content(self, sha256, etag, headers):
        """A file's content, or the one range of it that is asked for."""
        data, headers = self.hub.get(sha256), headers | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or asked.groups() == ("", ""):
            return partial(self.send_file, 200, data, headers)
        first, last = asked.groups()
        start, stop = (int(first), int(last or len(data)) + 1) if first else (len(data) - int(last), len(data))
        start, stop = max(start, 0), min(stop, len(data))
        if start >= stop:
            raise HubError(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return partial(self.send_file, 206, data[start:stop], headers)

    # Routes: uploads.

    def preupload(self, id, type, rev):
        commit, files = self.writable(id, type).commit(rev), []
        for file in self.json_body()["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            there = commit.files.get(file["path"])
            oid = there and (there.sha256 if there.lfs else there.oid)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.json({"files": files, "commitOid": commit.sha})

    def lfs_batch(self, id, type):
        repo, objects = self.writable(id, type), []
        there = {file.sha256 for commit in repo.commits.values() for file in commit.files.values() if file.lfs}
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in there:
                upload = {"href": f"{self.hub.storage}/lfs/{wanted['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            objects.append(answer)
        return self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            raise HubError(400, None, "The content is not what its sha256 promises")
        self.hub.put(self.body, True)
        return partial(self.send, 200, b"", {})

    def lfs_verify(self):
        wanted = json.loads(self.body)
        content = self.hub.folder / wanted["oid"]
        if not content.exists() or content.stat().st_size != wanted["size"]:
            raise HubError(404, None, "Object does not exist on the server")
        return self.json({"message": "ok"})

    def commit(self, id, type, rev):
        repo = self.writable(id, type)
        if "create_pr" in self.query:
            raise HubError(400, None, "The local Hub has no pull requests")
        if rev not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        head = repo.commit(rev)
        items = [json.loads(line) for line in self.body.splitlines()]
        header, files = items[0]["value"], dict(head.files)
        if header.get("parentCommit", head.sha) != head.sha:
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        for key, value in [(item["key"], item["value"]) for item in items[1:]]:
            path = value["path"]
            if key == "file":
                data = base64.b64decode(value["content"])
                if len(data) > REGULAR_LIMIT:
                    raise HubError(400, None, f"{path} is larger than 10 MiB and not an LFS file")
                files[path] = self.hub.put(data, False)
            elif key == "lfsFile":
                if not (self.hub.folder / value["oid"]).exists():
                    raise HubError(400, None, f"The LFS pointer {path} points to a file that does not exist")
                files[path] = self.hub.file(value["oid"], True)
            else:  # deletedFile, deletedFolder
                gone = [
                    p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path.rstrip('/')}/"))
                ]
                if not gone:
                    raise HubError(404, "EntryNotFound", f"{path} does not exist")
                for name in gone:
                    del files[name]
        commit = self.hub.add_commit(repo, rev, header["summary"], files)
        url = f"{self.hub.endpoint}/{prefix(repo)}/commit/{commit.sha}"
        return self.json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    # Answers.

    def json(self, value, status=200, headers=None):
        return partial(self.send, status, json.dumps(value).encode(), JSON | (headers or {}))

    def answer_error(self, error):
        headers = {"X-Error-Message": error.message.encode("ascii", "replace").decode()}
        headers |= {"X-Error-Code": error.code} if error.code else {}
        self.json({"error": error.message} | error.body, error.status, headers | error.headers)()

    def send_file(self, status, data, headers):
        reads = self.command == "GET"
        self.send(status, data, headers, self.hub.fault(f"GET {self.path}", of_body=True) if reads else None)

    def send(self, status, body, headers, fault=None):
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Request-Id": f"Root=1-{secrets.token_hex(12)}"} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        pieces = {"cut": 2, "stall": 2, "slow": 10}.get(fault, 1)
        for i in range(pieces):
            self.wfile.write(body[len(body) * i // pieces : len(body) * (i + 1) // pieces])
            if fault == "slow":
                self.hub.closing.wait(self.hub.delay)
            elif fault:
                if fault == "stall":
                    self.hub.closing.wait(60)
                raise ConnectionAbortedError
