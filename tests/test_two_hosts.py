"""One server over two hosts, with Ray and without: what it answers, and what a cut cable does.

The hosts are network namespaces of this machine; where these are not permitted nothing is shown.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.two_hosts import ROOT, TwoHosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(600)]

PROMPT = "The for statement"
NUM_TOKENS = 400
PORT = 8123
RAY_PORT = 6380
SHARED = ("-tp", "2", "-pp", "2", "--num-threads", "1", "--num-device-blocks", "200")
SECRET = {"FASTSERVE_CLUSTER_SECRET": "a secret of these two hosts"}
NOTICED_S = 5.0
START_S = 240.0

# Streams an answer through OpenAI's client, a line of JSON for each piece.
CLIENT = f"""
import json, openai
client = openai.OpenAI(base_url="http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0)
stream = client.completions.create(
    model="demo", prompt={PROMPT!r}, max_tokens={NUM_TOKENS}, temperature=0, stream=True,
    extra_body={{"ignore_eos": True}},
)
for chunk in stream:
    print(json.dumps(chunk.choices[0].text), flush=True)
"""
# The same answer, from one process.
ALONE = f"""
import json
from fastserve import LLM, SamplingParams
params = SamplingParams(temperature=0, max_tokens={NUM_TOKENS}, ignore_eos=True)
with LLM("demo", num_threads=1) as llm:
    print(json.dumps(llm.generate([{PROMPT!r}], params)[0].outputs[0].text))
"""


@pytest.fixture(scope="module")
def expected() -> str:
    """What one process answers."""
    made = subprocess.run(
        (sys.executable, "-c", ALONE), cwd=ROOT, capture_output=True, check=True, text=True
    )
    return str(json.loads(made.stdout.splitlines()[-1]))


@pytest.fixture(autouse=True)
def _plain_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray neither count its users nor leave a token in the home directory."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    """Two hosts, or a skip that says why not."""
    if reason := why_not():
        pytest.skip(reason)
    with TwoHosts() as made:
        yield made


class Server:
    """Processes on the hosts, of which the first serves."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self.hosts = hosts
        self.log = folder / "log-0"
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, host: int, command: Sequence[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a process that ends with the test, if not before."""
        log = self._folder / f"log-{len(self._processes)}"
        self._processes.append(self.hosts.start(host, command, environment, log))
        return self._processes[-1]

    def wait_for(self, words: str, limit_s: float = START_S) -> float:
        """Wait until the first process has said something; return how many seconds it took."""
        begun = time.monotonic()
        while not re.search(words, self.log.read_text()):
            assert self._processes[0].poll() is None, self.log.read_text()
            assert time.monotonic() - begun < limit_s, self.log.read_text()
            time.sleep(0.02)
        return time.monotonic() - begun

    def close(self) -> None:
        """End what has not ended."""
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


def check(server: Server, expected: str) -> None:
    """Answer; lose the second host in the middle of an answer; finish it when the host is back."""
    server.wait_for("Serving demo")
    answer = server.hosts.run(0, (sys.executable, "-c", CLIENT))
    assert "".join(map(json.loads, answer.splitlines())) == expected
    asking = subprocess.Popen(
        server.hosts.on(0, (sys.executable, "-c", CLIENT)), stdout=subprocess.PIPE, text=True
    )
    with asking as client:
        assert client.stdout is not None
        pieces = [client.stdout.readline()]
        server.hosts.cut()
        try:
            line = r"rank [0-3] \(\S+ at 10\.77\.0\.2, stage .*last heard"
            noticed_s = server.wait_for(line, 20.0)
        finally:
            server.hosts.mend()
        pieces += client.stdout.readlines()
    assert noticed_s <= NOTICED_S
    assert client.returncode == 0
    assert "".join(map(json.loads, pieces)) == expected
    assert "1 requests go on" in server.log.read_text()
    print(f"a cut cable was noticed after {noticed_s:.1f} s")  # noqa: T201 - pytest -s shows it


def serve(*words: str, model: str = "demo") -> tuple[str, ...]:
    """Return the command line of one host."""
    command = (sys.executable, "-P", "-m", "fastserve", "serve", model)
    return (*command, *SHARED, "--port", str(PORT), *words)


def test_hosts_that_are_started_one_by_one(hosts: TwoHosts, expected: str, tmp_path: Path) -> None:
    """Both leave with status 0 when the first is asked to."""
    server = Server(hosts, tmp_path)
    try:
        shared = ("--nnodes", "2", "--master-addr", hosts.addresses[0], "--node-rank")
        first, second = (server.start(host, serve(*shared, str(host)), SECRET) for host in range(2))
        check(server, expected)
        first.terminate()
        assert [first.wait(60), second.wait(60)] == [0, 0]
    finally:
        server.close()


def test_a_host_with_another_checkpoint_is_refused(hosts: TwoHosts, tmp_path: Path) -> None:
    """Both hosts end at once, and say what differs."""
    server = Server(hosts, tmp_path)
    other = tmp_path / "demo"
    subprocess.run(("cp", "-r", str(ROOT / "fastserve" / "demo"), str(other)), check=True)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    try:
        shared = ("--nnodes", "2", "--master-addr", hosts.addresses[0], "--node-rank")
        first = server.start(0, serve(*shared, "0"), SECRET)
        second = server.start(1, serve(*shared, "1", model=str(other)), SECRET)
        assert [first.wait(START_S), second.wait(START_S)] == [2, 1]
        line = r"rank [23] on \S+ at 10\.77\.0\.2 differs from the engine: checkpoint is \w+ there"
        for log in ("log-0", "log-1"):
            assert re.search(line, (tmp_path / log).read_text())
    finally:
        server.close()


@contextlib.contextmanager
def ray_cluster(hosts: TwoHosts, folder: Path, num_cpus: int) -> Iterator[dict[str, str]]:
    """Run Ray on both hosts; yields the environment in which it is found."""
    folder.mkdir()
    cluster = Server(hosts, folder)
    first, second = hosts.addresses
    environment = {"RAY_ADDRESS": f"{first}:{RAY_PORT}"}
    ray = str(Path(sys.executable).with_name("ray"))
    start = (ray, "start", "--block", "--num-cpus", str(num_cpus), "--node-ip-address")
    # A socket's path has 107 characters at most: fewer than those of a test's folder.
    with tempfile.TemporaryDirectory(prefix="ray-") as sockets:
        head = ("--head", "--port", str(RAY_PORT), "--include-dashboard=false")
        try:
            cluster.start(0, (*start, first, *head, "--temp-dir", sockets), environment)
            cluster.wait_for("Ray runtime started")
            cluster.start(1, (*start, second, "--address", f"{first}:{RAY_PORT}"), environment)
            wait_for_nodes(hosts, 2)
            yield environment
        finally:
            cluster.close()


def test_hosts_of_a_ray_cluster(hosts: TwoHosts, expected: str, tmp_path: Path) -> None:
    """Ray places a stage on each host; after the loss of one, ranks are placed anew."""
    pytest.importorskip("ray", reason="Ray is not installed")
    server = Server(hosts, tmp_path)
    with ray_cluster(hosts, tmp_path / "ray", num_cpus=2) as environment:
        try:
            server.start(0, serve("--distributed-executor-backend", "ray"), environment)
            check(server, expected)
        finally:
            server.close()


def test_replicas_on_the_hosts_of_a_ray_cluster(
    hosts: TwoHosts, expected: str, tmp_path: Path
) -> None:
    """Each host has a copy of the model; what a lost one had under way, the other goes on with."""
    pytest.importorskip("ray", reason="Ray is not installed")
    server = Server(hosts, tmp_path)
    words = ("--distributed-executor-backend", "ray", "-dp", "2", "-tp", "1", "-pp", "1")
    with ray_cluster(hosts, tmp_path / "ray", num_cpus=1) as environment:
        try:
            server.start(0, serve(*words), environment)
            server.wait_for("Serving demo")
            wait_for_replicas(hosts, 2)
            asking = [
                subprocess.Popen(
                    hosts.on(0, (sys.executable, "-c", CLIENT)), stdout=subprocess.PIPE, text=True
                )
                for _ in range(2)
            ]
            pieces = [[client.stdout.readline()] for client in asking if client.stdout]
            hosts.cut()
            server.wait_for(r"rank 0 \(\S+ at 10\.77\.0\.2, .*last heard", 20.0)
            for client, heard in zip(asking, pieces, strict=True):
                with client:
                    assert client.stdout is not None
                    heard += client.stdout.readlines()
                assert client.returncode == 0
                assert "".join(map(json.loads, heard)) == expected
        finally:
            server.close()


def wait_for_replicas(hosts: TwoHosts, number: int) -> None:
    """Wait until so many replicas serve."""
    command = (
        "import re, time, urllib.request\n"
        "def num_serving():\n"
        f"    page = urllib.request.urlopen('http://127.0.0.1:{PORT}/metrics').read().decode()\n"
        "    return float(re.search(r'replicas_serving{.*} (.+)', page)[1])\n"
        f"while num_serving() < {number}: time.sleep(0.2)\n"
    )
    hosts.run(0, (sys.executable, "-c", command))


def wait_for_nodes(hosts: TwoHosts, number: int) -> None:
    """Wait until a cluster has so many hosts."""
    command = (
        "import ray, time\n"
        f"ray.init('{hosts.addresses[0]}:{RAY_PORT}', log_to_driver=False)\n"
        f"while sum(node['Alive'] for node in ray.nodes()) < {number}: time.sleep(0.2)\n"
    )
    hosts.run(0, (sys.executable, "-c", command))
