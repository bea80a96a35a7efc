"""Starting servers, loading them with wrk, and reading what they used."""

import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# How long anything may take before the run goes on without it.
PATIENCE = 60
TICKS = os.sysconf("SC_CLK_TCK")


class Failure(Exception):
    """A server did not do its work; the run goes on without this figure."""


def end_when_told():
    """Has SIGTERM end the program as an error does: what it started is stopped, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def require_wrk():
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing: install it, for example by `apt install wrk`")


def run_settings(**options):
    """What a run was made with: the machine, and its options."""
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return {"machine": system, "processors": len(os.sched_getaffinity(0)), **options}


def write_json(path, data):
    """Keeps what was measured."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def pyplot(**settings):
    """The plotting library, set up for small files with text; none if it is not there."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: install bench/requirements.txt for matplotlib", file=sys.stderr)
        return None
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "wsgi-wasm", "svg.fonttype": "none", "font.size": 9, **settings})
    import matplotlib.pyplot as plt

    return plt


class Server:
    """A server's processes, from start to end. Use it in a `with` block.

    In a session of its own, the kernel may give it as much of a processor as all
    other processes together (autogroups, see sched(7)); else each thread counts.
    """

    # Those that run, so that none is left behind whatever happens.
    running = set()

    def __init__(self, command, port, cores, log, environment=None, directory=None, own_session=True):
        self.port = port
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as output:
            self.begin = time.perf_counter()
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Backtraces of errors are for those who look for a bug.
                env={**os.environ, "RUST_BACKTRACE": "0", **(environment or {})},
                cwd=directory,
                # The group tells which processes belong to it.
                process_group=None if own_session else 0,
                start_new_session=own_session,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        Server.running.add(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Ends all its processes."""
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            pass
        try:
            # Workers that outlived their master, too.
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        Server.running.discard(self)

    def failure(self, what):
        """What went wrong, with the end of the server's log."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-8:]
        return Failure("\n".join([what, *lines]))

    def get(self, path, method="GET", body=None, host=None):
        """One request on a connection of its own; status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Host": host} if host else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def wait_for(self, path, method="GET", body=None, host=None):
        """Waits for the first 200; its body, and the seconds since the start."""
        while True:
            try:
                status, content = self.get(path, method, body, host)
                break
            except (ConnectionError, http.client.HTTPException) as error:
                if self.process.poll() is not None:
                    raise self.failure(f"ended with status {self.process.returncode}") from None
                if time.perf_counter() - self.begin > PATIENCE:
                    raise self.failure(f"did not answer: {error}") from None
                time.sleep(0.001)
            except OSError as error:
                raise self.failure(f"did not answer: {error}") from None
        seconds = time.perf_counter() - self.begin
        if status != 200:
            raise self.failure(f"answered {path} with status {status}")
        return content, seconds

    def processes(self):
        """Names in /proc of its processes, with their `stat` fields after the command."""
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[2]) == self.process.pid:
                    yield entry, fields

    def processor_seconds(self):
        """Processor time of all its processes, ended children included."""
        return sum(sum(map(int, fields[11:15])) for _, fields in self.processes()) / TICKS

    def memory(self):
        """Bytes of memory: proportional set size of all its processes."""
        total = 0
        for entry, _ in self.processes():
            try:
                rollup = Path("/proc", entry, "smaps_rollup").read_text()
            except OSError:
                continue
            total += int(rollup.split("\nPss:")[1].split()[0]) * 1024
        return total


def load(server, path, method, size, connections, seconds):
    """Loads a server, and returns the figures of one round."""
    command = [
        "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", HERE / "load.lua",
        f"http://127.0.0.1:{server.port}{path}", "--", method, str(size),
    ]  # fmt: skip
    before = server.processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + PATIENCE)
    used = server.processor_seconds() - before
    if done.returncode != 0:
        raise server.failure(f"wrk failed: {done.stdout}{done.stderr}")
    figures = json.loads(done.stdout.rpartition("\n{")[1] + done.stdout.rpartition("\n{")[2])
    if figures["refused"]:
        raise server.failure(f"{figures['refused']} of {figures['requests']} requests were refused")
    if not figures["requests"]:
        raise server.failure("answered no request under load")
    return {
        "rate": figures["requests"] / figures["seconds"],
        **{name: figures[name] / 1000 for name in ("p50", "p90", "p99")},
        "cpu": used / figures["requests"] * 1e6,
        "memory": server.memory(),
        "broken": figures["broken"] + figures["timeouts"],
    }
