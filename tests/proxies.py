"""Real proxies before the app, as processes of their own: nginx and Caddy, from Debian's packages.

They run the files of `deploy/`, in which only names, ports and certificates are replaced, or a
test's own configuration; they listen on 127.0.0.1 only and keep everything in a folder of a test.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mochi_app.files import PROJECT_DIR
from tests.serving import poll

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "nginx"
CADDY = shutil.which("caddy") or "caddy"
DEPLOY = PROJECT_DIR / "deploy"
PREFIX = "/mochi"

NGINX_FRAME = """
daemon off;
error_log stderr;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""

# As Gradio's guide "Running Gradio on your Web Server with Nginx" has it: $host knows no port.
GRADIOS_GUIDE = """
server {{
    listen 127.0.0.1:{port};
    server_name gpubox;

    location {prefix}/ {{
        proxy_pass http://127.0.0.1:{app_port}/;
        proxy_buffering off;
        proxy_redirect off;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection "upgrade";
        proxy_set_header Host $host;
        proxy_set_header X-Forwarded-Host $host;
        proxy_set_header X-Forwarded-Proto $scheme;
    }}
}}
"""

# Without a word of headers, nginx passes the app's own address on as Host.
NO_HEADERS = """
server {{
    listen 127.0.0.1:{port} {ssl};
    ssl_certificate {certificate};
    ssl_certificate_key {certificate};

    location / {{
        proxy_pass http://127.0.0.1:{app_port};
        proxy_buffering off;
    }}
}}
"""

# Many proxies leave the path as it is.
PASSES_PREFIX = """
server {{
    listen 127.0.0.1:{port};

    location {prefix} {{
        proxy_pass http://127.0.0.1:{app_port};
        proxy_buffering off;
        proxy_set_header Host $http_host;
    }}
}}
"""


def needs(program: str) -> pytest.MarkDecorator:
    """Skip where a program is not installed; never in CI, which installs it."""
    missing = shutil.which(program) is None and "CI" not in os.environ
    return pytest.mark.skipif(missing, reason=f"needs Debian's {Path(program).name}")


class Proxy:
    """A running proxy; `end` it."""

    def __init__(self, command: Sequence[str], port: int, folder: Path) -> None:
        log = folder / "proxy.log"
        environment = os.environ | {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )

        def listens() -> bool:
            assert self._process.poll() is None, f"{command[0]} ended:\n{log.read_text()}"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        poll(listens, f"{command[0]} on port {port}")

    def end(self) -> None:
        """Stop it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(15)


def nginx(folder: Path, server: str, port: int) -> Proxy:
    """nginx with these `server` blocks, which listen on the port."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    config.write_text(NGINX_FRAME.format(folder=folder, server=server))
    return Proxy([NGINX, "-p", str(folder), "-e", "stderr", "-c", str(config)], port, folder)


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """The text with each first of a pair, which must be there, replaced by its second."""
    for old, new in pairs:
        assert old in text, f"{old!r} is not in {text}"
        text = text.replace(old, new)
    return text


def uncommented(text: str, begin: str) -> str:
    """The text whose last comment, from the line that begins so, is put in force."""
    head, tail = text.split(f"# {begin}", 1)
    return head + begin + tail.replace("# ", "")


def deployed_nginx(
    folder: Path, app_port: int, ports: tuple[int, int], certificate: Path, prefix: bool
) -> Proxy:
    """nginx with `deploy/nginx.conf`, on these ports for http and https."""
    text = (DEPLOY / "nginx.conf").read_text()
    if prefix:
        text = replaced(text, ("location / {", "location /unused {"))
        text = uncommented(text, f"location {PREFIX}/ {{")
    text = replaced(
        text,
        ("listen 80;", f"listen 127.0.0.1:{ports[0]};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{ports[1]} ssl;"),
        ("mochi.example", "gpubox"),
        ("/etc/ssl/mochi.pem", str(certificate)),
        ("/etc/ssl/mochi.key", str(certificate)),
        ("127.0.0.1:7860", f"127.0.0.1:{app_port}"),
    )
    return nginx(folder, text, ports[1])


def caddyfile(app_port: int, port: int, certificate: Path, prefix: bool) -> str:
    """`deploy/Caddyfile`, on this port for https."""
    text = (DEPLOY / "Caddyfile").read_text()
    if prefix:
        text = uncommented(text, f"redir {PREFIX} {PREFIX}/")
        text = re.sub(r"\treverse_proxy [^}]*}\n", "", text, count=1)
    return "{\n\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n}\n" + replaced(
        text,
        (
            "mochi.example {",
            f"https://gpubox:{port} {{\n\tbind 127.0.0.1\n\ttls {certificate} {certificate}\n",
        ),
        ("127.0.0.1:7860", f"127.0.0.1:{app_port}"),
    )


def deployed_caddy(
    folder: Path, app_port: int, port: int, certificate: Path, prefix: bool
) -> Proxy:
    """Caddy with `deploy/Caddyfile`, on this port for https."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "Caddyfile"
    config.write_text(caddyfile(app_port, port, certificate, prefix))
    return Proxy([CADDY, "run", "--config", str(config)], port, folder)


def certificate(folder: Path) -> Path:
    """A self-signed certificate for `gpubox`, its key in the same file."""
    path = folder / "gpubox.pem"
    ask = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    subprocess.run(
        [*ask.split(), "-subj", "/CN=gpubox", "-addext", "subjectAltName=DNS:gpubox",
         "-keyout", str(path), "-out", str(folder / "only.pem")],
        check=True,
        capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + (folder / "only.pem").read_bytes())
    return path
