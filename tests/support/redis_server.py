"""A real redis-server on a free loopback port, with a folder and password of its own, and TLS on request."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import redis

from async_rl.runtime.process import signal_on_parent_death

PASSWORD = "not a secret"


class RedisServer:
    """A server process whose data outlives ``restart`` (append-only file)."""

    def __init__(self, *options: str, tls: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.options = options
        self.tls = tls
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "password").write_text(PASSWORD + "\n")
        if tls:
            make_certificate(self.folder)
        self.start()

    @property
    def settings(self) -> dict:
        """The queue's, for a run's config."""
        scheme = "rediss" if self.tls else "redis"
        connection = {
            "url": f"{scheme}://127.0.0.1:{self.port}/0",
            "password_file": str(self.folder / "password"),
        }
        if self.tls:
            connection["ca_file"] = str(self.folder / "cert.pem")
        return {"backend": "redis", "redis": connection}

    def start(self) -> None:
        port = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        if self.tls:
            port += ["--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "cert.pem"]
            port += ["--tls-auth-clients", "no"]
        command = ["redis-server", "--bind", "127.0.0.1", *port, "--requirepass", PASSWORD, "--appendonly", "yes"]
        self.process = subprocess.Popen(
            [*command, "--save", "", *self.options],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            # A test process that is killed ends no fixture.
            preexec_fn=partial(signal_on_parent_death, signal.SIGKILL),
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                if self.client().ping():
                    return
            except redis.RedisError:
                assert time.monotonic() < deadline, "redis-server did not start"
                assert self.process.poll() is None, "redis-server ended"
                time.sleep(0.05)

    def client(self) -> redis.Redis:
        tls = {"ssl": True, "ssl_ca_certs": str(self.folder / "cert.pem")} if self.tls else {}
        return redis.Redis(host="127.0.0.1", port=self.port, password=PASSWORD, **tls)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        shutil.rmtree(self.folder)


def make_certificate(folder: Path) -> None:
    """Self-signed, for 127.0.0.1."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
