"""The endpoints of the loopback hub: one function per row of the client's contract."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from tests.hub.loopback.server import Answer, Request
from tests.hub.loopback.state import Commit, File, Refusal, Repo, User, is_lfs

if TYPE_CHECKING:
    from tests.hub.loopback.server import Loopback

Endpoint = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []
REPO = r"/api/models/(?P<repo>[^/]+/[^/]+)"
DATE = "2026-01-01T00:00:00.000Z"


def on(methods: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    def register(function: Endpoint) -> Endpoint:
        ROUTES.append((methods, re.compile(pattern), function))
        return function

    return register


def route(hub: Loopback, request: Request) -> Answer:
    for methods, pattern, function in ROUTES:
        found = pattern.fullmatch(request.path)
        if found and request.method in methods.split():
            with hub.state.lock:
                return function(hub, request, **{k: v and unquote(v) for k, v in found.groupdict().items()})
    raise Refusal(404, f"no route for {request}")


def as_json(value: Any, **headers: str) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


# --- who may do what -------------------------------------------------------------------------------------------------


def user_of(hub: Loopback, request: Request) -> User | None:
    if request.token is None:
        return None
    if request.token not in hub.state.users:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return hub.state.users[request.token]


class Moved(Refusal):
    """307 to the new name of a repository."""


def readable(hub: Loopback, request: Request, name: str) -> Repo:
    """The repository, if this user may see it."""
    user = user_of(hub, request)
    if new := hub.state.renamed.get(name):
        query = "&".join(f"{k}={v}" for k, vs in request.query.items() for v in vs)
        place = request.path.replace(name, new, 1) + (f"?{query}" if query else "")
        raise Moved(307, "moved", headers={"Location": hub.url + place})
    repo = hub.state.repos.get(name)
    owner = user is not None and user.name == name.split("/")[0]
    if repo is None or (repo.private and not owner):
        raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
    if repo.disabled:
        raise Refusal(403, "Access to this resource is disabled.")
    return repo


def content_readable(hub: Loopback, request: Request, name: str) -> Repo:
    """The repository, if this user may read its files: gated ones ask for consent."""
    repo = readable(hub, request, name)
    user = user_of(hub, request)
    if repo.gated and (user is None or user.name != name.split("/")[0]):
        raise Refusal(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
    return repo


def writable(hub: Loopback, request: Request, name: str) -> Repo:
    repo = readable(hub, request, name)
    user = user_of(hub, request)
    if user is None:
        raise Refusal(401, "Repository not found", "RepoNotFound")
    if user.role != "write" or user.name != name.split("/")[0]:
        raise Refusal(403, "you must use a token with write access")
    return repo


# --- accounts and repositories ---------------------------------------------------------------------------------------


@on("GET", "/api/whoami-v2")
def whoami(hub: Loopback, request: Request) -> Answer:
    user = user_of(hub, request)
    if user is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    role = {"displayName": "token", "role": user.role}
    return as_json(
        {"name": user.name, "type": "user", "orgs": [{"name": o} for o in user.orgs], "auth": {"accessToken": role}}
    )


@on("GET", "/api/agent-harnesses")
def harnesses(hub: Loopback, request: Request) -> Answer:
    return as_json({})


@on("POST", "/api/repos/create")
def create(hub: Loopback, request: Request) -> Answer:
    asked, user = json.loads(request.body), user_of(hub, request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    name = f"{asked.get('organization') or user.name}/{asked['name']}"
    if user.role != "write" or name.split("/")[0] != user.name:
        raise Refusal(403, "You don't have the rights to create a model under this namespace")
    url = f"{hub.url}/{name}"
    if name in hub.state.repos:
        body = json.dumps({"error": "You already created this model repo", "url": url}).encode()
        return Answer(409, body, {"Content-Type": "application/json"})
    hub.state.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return as_json({"url": url})


@on("DELETE", "/api/repos/delete")
def delete(hub: Loopback, request: Request) -> Answer:
    asked, user = json.loads(request.body), user_of(hub, request)
    name = f"{asked.get('organization') or (user and user.name)}/{asked['name']}"
    writable(hub, request, name)
    del hub.state.repos[name]
    return as_json({})


@on("PUT", REPO + "/settings")
def settings(hub: Loopback, request: Request, repo: str) -> Answer:
    asked, known = json.loads(request.body), writable(hub, request, repo)
    known.gated = bool(asked.get("gated", known.gated))
    known.private = asked.get("visibility", "private" if known.private else "public") == "private"
    return as_json({})


@on("GET", REPO + "/auth-check(?P<write>/write)?")
def auth_check(hub: Loopback, request: Request, repo: str, write: str | None) -> Answer:
    (writable if write else content_readable)(hub, request, repo)
    return as_json({})


@on("POST", "/api/validate-yaml")
def validate_yaml(hub: Loopback, request: Request) -> Answer:
    import yaml

    found = re.match(r"---\n(.*?)\n---", json.loads(request.body)["content"], re.DOTALL)
    problems = []
    try:
        data = yaml.safe_load(found[1]) if found else {}
        base = data.get("base_model")
        for name in base if isinstance(base, list) else [base] if base else []:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
                problems.append(f'"base_model" with value "{name}" is not valid')
    except yaml.YAMLError as error:
        problems.append(str(error))
    body = {"errors": [{"message": p} for p in problems], "warnings": []}
    return Answer(400 if problems else 200, json.dumps(body).encode(), {"Content-Type": "application/json"})


# --- what is there ---------------------------------------------------------------------------------------------------


@on("GET", "/api/models")
def list_models(hub: Loopback, request: Request) -> Answer:
    filters, text = request.query.get("filter", []), request.query.get("search", [""])[0]
    found = []
    for repo in hub.state.repos.values():
        info = model_document(hub, repo, repo.head(), blobs=False)
        if all(f in info["tags"] for f in filters) and text in repo.name and not repo.private:
            found.append({k: info[k] for k in ("id", "tags", "sha", "private", "createdAt", "downloads", "likes")})
    start, limit = int(request.query.get("from", ["0"])[0]), int(request.query.get("limit", ["1000"])[0])
    page = min(limit, 2)  # pages of two, so that paging is seen to work
    links = {}
    if start + page < len(found):
        rest = "&".join(f"{k}={v}" for k, vs in request.query.items() if k != "from" for v in vs)
        links["Link"] = f'<{hub.url}/api/models?{rest}&from={start + page}>; rel="next"'
    return as_json(found[start : start + page], **links)


def front_matter(commit: Commit) -> dict[str, Any]:
    import yaml

    readme = commit.files.get("README.md")
    found = re.match(r"---\n(.*?)\n---", (readme.data or b"").decode(), re.DOTALL) if readme else None
    try:
        return yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}


def model_document(hub: Loopback, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    card = front_matter(commit)
    bases = card.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    relation = card.get("base_model_relation")
    tags = [*card.get("tags", []), *(f"base_model:{b}" for b in bases)]
    tags += [f"base_model:{relation}:{b}" for b in bases if relation]
    siblings = [{"rfilename": path, **(blob(file) if blobs else {})} for path, file in sorted(commit.files.items())]
    return {
        "id": repo.name, "modelId": repo.name, "sha": commit.sha, "private": repo.private, "gated": repo.gated,
        "disabled": False, "tags": tags, "library_name": card.get("library_name"), "cardData": card,
        "pipeline_tag": card.get("pipeline_tag"), "siblings": siblings, "createdAt": DATE, "lastModified": DATE,
        "downloads": 0, "likes": 0, "securityRepoStatus": {"scansDone": True, "filesWithIssues": []},
    }  # fmt: skip


def blob(file: File) -> dict[str, Any]:
    known: dict[str, Any] = {"size": file.size, "blobId": file.oid}
    if file.sha256:
        known["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return known


@on("GET", REPO + "(/revision/(?P<rev>[^/]+))?")
def model_info(hub: Loopback, request: Request, repo: str, rev: str | None) -> Answer:
    known = readable(hub, request, repo)
    commit = known.find(rev or "main")
    document = model_document(hub, known, commit, blobs="blobs" in request.query)
    return as_json(document, **{"X-Repo-Commit": commit.sha})


def entry(hub: Loopback, path: str, file: File) -> dict[str, Any]:
    known: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.sha256:
        known["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        if xet := hub.state.xet_hashes.get(file.sha256):
            known["xetHash"] = xet
    return known


@on("GET", REPO + "/tree/(?P<rev>[^/]+)(/(?P<folder>.+))?")
def tree(hub: Loopback, request: Request, repo: str, rev: str, folder: str | None) -> Answer:
    commit = content_readable(hub, request, repo).find(rev)
    inside = f"{folder}/" if folder else ""
    files = [entry(hub, p, f) for p, f in sorted(commit.files.items()) if p.startswith(inside)]
    return as_json(files)


@on("POST", REPO + "/paths-info/(?P<rev>[^/]+)")
def paths_info(hub: Loopback, request: Request, repo: str, rev: str) -> Answer:
    commit = readable(hub, request, repo).find(rev)
    paths = parse_qs(request.body.decode()).get("paths", [])
    return as_json([entry(hub, p, commit.files[p]) for p in paths if p in commit.files])


@on("GET", REPO + "/refs")
def refs(hub: Loopback, request: Request, repo: str) -> Answer:
    known = readable(hub, request, repo)

    def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in names.items()]

    branches = {n: sha for n, sha in known.branches.items() if not n.startswith("refs/pr/")}
    return as_json({"branches": listed("heads", branches), "tags": listed("tags", known.tags), "converts": []})


@on("GET", REPO + "/commits/(?P<rev>[^/]+)")
def commits(hub: Loopback, request: Request, repo: str, rev: str) -> Answer:
    known = readable(hub, request, repo)
    found, commit = [], known.find(rev)
    while commit:
        found.append(commit)
        commit = known.commits.get(commit.parent or "")  # type: ignore[assignment]
    return as_json(
        [{"id": c.sha, "title": c.title, "message": "", "date": DATE, "authors": [{"user": c.author}]} for c in found]
    )


@on("POST DELETE", REPO + "/branch/(?P<branch>[^/]+)")
def branches(hub: Loopback, request: Request, repo: str, branch: str) -> Answer:
    known = writable(hub, request, repo)
    if request.method == "DELETE":
        del known.branches[branch]
        return as_json({})
    if branch in known.branches:
        raise Refusal(409, "Reference already exists")
    start = json.loads(request.body or b"{}").get("startingPoint") or "main"
    known.branches[branch] = known.find(start).sha
    return as_json({})


@on("POST", REPO + "/tag/(?P<rev>[^/]+)")
def tag(hub: Loopback, request: Request, repo: str, rev: str) -> Answer:
    known, name = writable(hub, request, repo), json.loads(request.body)["tag"]
    if name in known.tags:
        raise Refusal(409, "Tag reference exists already")
    known.tags[name] = known.find(rev).sha
    return as_json({})


@on("DELETE", REPO + "/tag/(?P<name>[^/]+)")
def untag(hub: Loopback, request: Request, repo: str, name: str) -> Answer:
    writable(hub, request, repo).tags.pop(name)
    return as_json({})


# --- writing ---------------------------------------------------------------------------------------------------------


def target_of(hub: Loopback, request: Request, repo: str) -> Repo:
    """Who may write may commit; who may read may open a pull request."""
    if "create_pr" in request.query and user_of(hub, request):
        return content_readable(hub, request, repo)
    return writable(hub, request, repo)


@on("POST", REPO + "/preupload/(?P<rev>[^/]+)")
def preupload(hub: Loopback, request: Request, repo: str, rev: str) -> Answer:
    commit, asked = target_of(hub, request, repo).find(rev), json.loads(request.body)
    ignored = [line for line in asked.get("gitIgnore", "").splitlines() if line]
    files = []
    for f in asked["files"]:
        there = commit.files.get(f["path"])
        mode = "lfs" if is_lfs(f["path"], f["size"]) else "regular"
        known = {"path": f["path"], "uploadMode": mode, "shouldIgnore": any(fnmatch(f["path"], p) for p in ignored)}
        files.append(known | ({"oid": there.sha256 or there.oid} if there else {}))
    return as_json({"files": files})


@on("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
def lfs_batch(hub: Loopback, request: Request, repo: str) -> Answer:
    if user_of(hub, request) is None:
        raise Refusal(401, "Repository not found", "RepoNotFound")
    asked = json.loads(request.body)
    objects = [_lfs_object(hub, repo, o, "multipart" in asked["transfers"]) for o in asked["objects"]]
    return as_json({"transfer": "multipart" if hub.multipart else "basic", "objects": objects})


def _lfs_object(hub: Loopback, repo: str, wanted: dict[str, Any], multipart: bool) -> dict[str, Any]:
    oid, size = wanted["oid"], wanted["size"]
    if oid in hub.state.lfs:
        return wanted
    upload: dict[str, Any] = {"href": f"{hub.cdn}/lfs/{oid}"}
    if multipart and hub.multipart and size > hub.multipart:
        count = -(-size // hub.multipart)
        parts = {str(n): f"{hub.cdn}/parts/{oid}/{n}" for n in range(1, count + 1)}
        upload = {"href": f"{hub.cdn}/complete/{oid}", "header": {"chunk_size": str(hub.multipart), **parts}}
    return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/{repo}.git/info/lfs/verify"}}}


@on("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub: Loopback, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "BadDigest")
    hub.state.lfs[oid] = request.body
    return Answer()


@on("PUT", "/parts/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
def part_put(hub: Loopback, request: Request, oid: str, number: str) -> Answer:
    hub.state.parts.setdefault(oid, {})[int(number)] = request.body
    return Answer(headers={"ETag": f'"part-{number}"'})


@on("POST", "/complete/(?P<oid>[0-9a-f]{64})")
def complete(hub: Loopback, request: Request, oid: str) -> Answer:
    named = [p["partNumber"] for p in json.loads(request.body)["parts"]]
    parts = hub.state.parts[oid]
    data = b"".join(parts[n] for n in named)
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refusal(400, "BadDigest")
    hub.state.lfs[oid] = data
    return as_json({})


@on("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify")
def lfs_verify(hub: Loopback, request: Request, repo: str) -> Answer:
    asked = json.loads(request.body)
    if len(hub.state.lfs.get(asked["oid"], b"")) != asked["size"]:
        raise Refusal(422, "size mismatch")
    return as_json({})


@on("GET", REPO + "/xet-(?P<kind>read|write)-token/(?P<rev>[^/]+)")
def xet_token(hub: Loopback, request: Request, repo: str, kind: str, rev: str) -> Answer:
    (content_readable if kind == "read" else writable)(hub, request, repo)
    if hub.xet is None:
        raise Refusal(404, "Not Found")
    place, token, expires = f"local://{hub.xet}", "xet_token", 4_000_000_000
    headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return as_json({"casUrl": place, "accessToken": token, "exp": expires}, **headers)


@on("POST", REPO + "/commit/(?P<rev>[^/]+)")
def commit(hub: Loopback, request: Request, repo: str, rev: str) -> Answer:
    known = target_of(hub, request, repo)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    title = next(x["value"] for x in lines if x["key"] == "header")
    branch, head = rev, known.find(rev)
    if title.get("parentCommit") not in (None, head.sha):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        _apply(hub, files, line["key"], line["value"])
    answer: dict[str, Any] = {"success": True}
    if "create_pr" in request.query:
        branch = f"refs/pr/{len(known.pulls) + 1}"
        known.pulls.append(title["summary"])
        known.branches[branch] = head.sha
        answer["pullRequestUrl"] = f"{hub.url}/{repo}/discussions/{len(known.pulls)}"
    user = user_of(hub, request)
    made = known.add(branch, files, title["summary"], user.name if user else "")
    return as_json({**answer, "commitOid": made.sha, "commitUrl": f"{hub.url}/{repo}/commit/{made.sha}"})


def _apply(hub: Loopback, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """One line of a commit."""
    if key == "file":
        files[value["path"]] = File.regular(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        files[value["path"]] = _lfs_file(hub, value["oid"], value.get("size"))
    elif key == "deletedFile":
        if files.pop(value["path"], None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        for path in [p for p in files if p.startswith(value["path"])]:
            del files[path]


def _lfs_file(hub: Loopback, oid: str, size: int | None) -> File:
    if oid not in hub.state.lfs and hub.xet is not None:
        from tests.hub.loopback.xet import received

        hub.state.xet_hashes |= received(hub.xet)
        if oid in hub.state.xet_hashes:
            return File.lfs(oid, int(size or 0))
    if oid not in hub.state.lfs:
        raise Refusal(400, f"LFS object {oid} was never uploaded")
    return File.lfs(oid, len(hub.state.lfs[oid]))


# --- reading ---------------------------------------------------------------------------------------------------------


@on("GET HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def resolve(hub: Loopback, request: Request, repo: str, rev: str, path: str) -> Answer:
    commit = content_readable(hub, request, repo).find(rev)
    commit_header = {"X-Repo-Commit": commit.sha}
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", commit_header)
    if file.sha256 is None:
        return _ranged(request, file.data or b"", {**commit_header, "ETag": f'"{file.oid}"'})
    headers = {
        **commit_header,
        "X-Linked-Etag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
        "Location": f"{hub.cdn}/blobs/{file.sha256}",
    }
    if xet := hub.state.xet_hashes.get(file.sha256):
        headers["X-Xet-Hash"] = xet
        headers["Link"] = f'<{hub.url}/api/models/{repo}/xet-read-token/{commit.sha}>; rel="xet-auth"'
    return Answer(302, b"", headers)


def size_of(hub: Loopback, oid: str) -> int:
    commits = (c for repo in hub.state.repos.values() for c in repo.commits.values())
    return next(f.size for c in commits for f in c.files.values() if f.sha256 == oid)


@on("GET HEAD", "/blobs/(?P<oid>[0-9a-f]{64})")
def cdn_blob(hub: Loopback, request: Request, oid: str) -> Answer:
    if oid not in hub.state.lfs and hub.xet is not None:
        from tests.hub.loopback.xet import bridged

        hub.state.lfs[oid] = bridged(hub.xet, hub.state.xet_hashes[oid], size_of(hub, oid))
    return _ranged(request, hub.state.lfs[oid], {"ETag": '"some-store-etag-3"'})


def _ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """The bytes that a Range asks for, or all of them."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    if request.method == "HEAD":
        return Answer(200, b"", headers, length=len(data))
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not found:
        return Answer(200, data, headers)
    start, end = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
    if start >= len(data):
        raise Refusal(416, "out of range", headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
