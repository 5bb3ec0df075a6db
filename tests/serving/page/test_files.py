"""The page's files as a browser gets them."""

from __future__ import annotations

import http.client
import re
from pathlib import Path

import httpx
import pytest

from tests.paths import ROOT
from tests.serving.page.scripted_server import ScriptedServer

PAGE = ROOT / "kimia_infer" / "serving" / "page"
LONGEST_FILE = 400
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".js": "text/javascript",
}


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_files_have_their_type_and_a_policy(scripted: ScriptedServer, path: Path) -> None:
    answer = httpx.get(f"{scripted.url}/page/{path.name}")
    assert (answer.status_code, answer.content) == (200, path.read_bytes())
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind.replace("application/javascript", "text/javascript") == KINDS[path.suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_the_page_is_at_the_root_and_names_its_files_relatively(scripted: ScriptedServer) -> None:
    answer = httpx.get(scripted.url)
    assert answer.text == (PAGE / "index.html").read_text()
    assert "content-security-policy" in answer.headers
    links = re.findall(r'(?:href|src)="([^"]+)"', answer.text)
    assert all((PAGE / Path(link).name).exists() and link.startswith("page/") for link in links)
    assert httpx.head(scripted.url).headers["content-type"] == answer.headers["content-type"]


def test_nothing_comes_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        found = re.findall(r"https?://[^\s\"')]+", path.read_text())
        known = ("http://www.w3.org/2000/svg", "https:// or", "http://localhost")
        assert [url for url in found if not url.startswith(known)] in ([], ["https://"]), path.name


@pytest.mark.parametrize(
    "path",
    [
        *("/page/../page.py", "/page/..%2fopenai%2fpage.py", "/page/%2e%2e/openai/page.py"),
        *("/page//etc/passwd", "/page/%00", "/page/", "/page/none.js", "/page/..%5capp.js"),
    ],
)
def test_only_files_of_the_page_are_served(scripted: ScriptedServer, path: str) -> None:
    host, port = scripted.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", path)  # which sends the path as it is
    assert connection.getresponse().status == 404
    connection.close()


def test_an_unchanged_file_is_not_sent_again(scripted: ScriptedServer) -> None:
    url = f"{scripted.url}/page/app.js"
    first = httpx.get(url)
    assert first.headers["cache-control"] == "no-cache"
    again = httpx.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
