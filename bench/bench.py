"""Measures wsgi-wasm beside what one would take instead; see README.md.

    python3 bench/bench.py [--quick] [--only hello,flask] [--report]
"""

import argparse
import atexit
import functools
import json
import os
import platform
import secrets
import shutil
import sys
import time
from pathlib import Path

import contestants
import marked
from contestants import (
    FLASK, GRANIAN, GUNICORN, INTERPRETER, PEERS, WASMTIME, WORK, WORKLOADS, WSGI_WASM, Tools, Unavailable,
)  # fmt: skip
from measure import Failure, Server, end_when_told, free_port, load, require_wrk, write_json

RESULTS = Path(__file__).resolve().parent / "results"


class Run:
    """What is measured, how long and where."""

    def __init__(self, args, tools):
        self.tools = tools
        self.server_cores = cores(args.server_cores)
        self.load_cores = cores(args.load_cores)
        self.rounds = args.rounds or (1 if args.quick else 5)
        self.seconds = args.seconds or (1 if args.quick else 3)
        # Warming up: until nothing changes any more, or for a glance.
        self.warmup = 0.3 if args.quick else 1.5
        self.connections = args.connections
        self.tenants = args.tenants or (4 if args.quick else 50)
        self.peers = [peer for peer in PEERS if not args.peers or peer.name in args.peers.split(",")]
        # wrk inherits it.
        os.sched_setaffinity(0, self.load_cores)

    def settings(self):
        """What a reader of the figures has to know."""
        return {
            "rounds": self.rounds,
            "seconds": self.seconds,
            "connections": self.connections,
            "server cores": sorted(self.server_cores),
            "load cores": sorted(self.load_cores),
        }

    def server(self, peer, app, label):
        """Starts a server."""
        port = free_port()
        command, environment, directory = self.tools.command(peer, app, port, len(self.server_cores))
        log = WORK / "logs" / f"{label}-{peer.name}.log"
        return Server(command, port, self.server_cores, log, environment, directory)

    def able(self, peers, app):
        """The peers that can be measured, made ready, and why the others can not."""
        failures = {}
        for peer in peers:
            try:
                self.tools.prepare(peer, app)
            except Unavailable as error:
                failures[peer.name] = str(error)
                say(f"  {peer.name} is left out: {error}")
        return [peer for peer in peers if peer.name not in failures], failures

    def each_round(self, peers, failures, measure):
        """Calls `measure(peer)` for all peers in turn, round by round; figures by name.

        A peer that fails is out, with its reason, and the others go on.
        """
        figures = {peer.name: [] for peer in peers}
        for number in range(self.rounds):
            for peer in peers:
                if peer.name in failures:
                    continue
                try:
                    figures[peer.name].append(measure(peer))
                except (Failure, OSError) as error:
                    failures[peer.name] = str(error)
                    say(f"  {peer.name} failed: {error}")
            say(f"  round {number + 1} of {self.rounds}")
        return {name: rounds for name, rounds in figures.items() if rounds and name not in failures}

    def workload(self, workload):
        """One workload on all servers."""
        peers, failures = self.able(self.peers, workload.app)
        body = b"x" * workload.upload or None
        connections = workload.connections or self.connections
        seconds = warming = self.seconds
        if self.warmup >= 1:
            # Long enough for the first ones to be done.
            seconds, warming = max(seconds, workload.seconds), max(warming, workload.seconds // 2)
        answers = {}

        def measure(peer):
            with self.server(peer, workload.app, workload.name) as server:
                content, start = server.wait_for(workload.path, workload.method, body)
                if content != answers.setdefault("first", content):
                    raise server.failure(f"answered otherwise than the others: {content[:200]!r}")
                ask = functools.partial(
                    load, server, workload.path, workload.method, workload.upload, connections
                )
                end = time.perf_counter() + self.warmup
                warm = 0
                # Some requests at least, however long they take.
                while time.perf_counter() < end or warm < 3:
                    if self.warmup >= 1:
                        ask(warming)
                        warm += 3
                    else:
                        server.wait_for(workload.path, workload.method, body)
                        warm += 1
                return {**ask(seconds), "start": start * 1000}

        figures = self.each_round(peers, failures, measure)
        return {
            **self.settings(),
            "seconds": seconds,
            "connections": connections,
            "bytes": len(answers.get("first", b"")),
            "rounds of": figures,
            "failures": failures,
        }

    def interpreter(self):
        """Pure Python: native, and in the sandbox with all its interruption."""
        peers, failures = self.able(
            [peer for peer in (GUNICORN, WSGI_WASM, WASMTIME) if peer in self.peers], INTERPRETER
        )
        answers = {}

        def measure(peer):
            with self.server(peer, INTERPRETER, "interpreter") as server:
                content, _ = server.wait_for("/")
                figures = {}
                for name in json.loads(content)["names"]:
                    answer = json.loads(server.wait_for(f"/{name}")[0])
                    if answer["result"] != answers.setdefault(name, answer["result"]):
                        raise server.failure(f"`{name}` came to {answer['result']}")
                    figures[name] = answer["seconds"] * 1000
                return figures

        figures = self.each_round(peers, failures, measure)
        return {**self.settings(), "rounds of": figures, "failures": failures}

    def tenancy(self):
        """Memory of many tenants with the same Flask app, each with an instance that has served."""
        peers = [peer for peer in (WSGI_WASM, GRANIAN, GUNICORN, WASMTIME) if peer in self.peers]
        peers, failures = self.able(peers, FLASK)

        def measure(peer):
            return self.many_tenants(self.tenants) if peer is WSGI_WASM else self.many_servers(peer)

        figures = self.each_round(peers, failures, measure)
        return {**self.settings(), "rounds of": figures, "failures": failures}

    def many_servers(self, peer):
        """A server for each tenant: memory of the first ones, and of each further one."""
        few, many = 2, 4 if self.tenants < 10 else 10
        servers = []
        try:
            memory = {}
            for count in range(1, many + 1):
                server = self.server(peer, FLASK, f"tenant-{count}")
                servers.append(server)
                for _ in range(20):
                    server.wait_for("/")
                if count in (few, many):
                    memory[count] = sum(server.memory() for server in servers)
        finally:
            for server in servers:
                server.stop()
        further = (memory[many] - memory[few]) / (many - few)
        return {"tenants": many, "base": memory[few] - few * further, "further": further}

    def many_tenants(self, count):
        """One wsgi-wasm with many tenants: memory, and the time of loading."""
        directory = WORK / "tenants"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        artifact = self.tools.artifact(FLASK).read_bytes()
        environment = {"WSGI_WASM_CACHE": str(directory / "cache")}

        def start(number):
            port = free_port()
            lines = [f'[server]\nbind = ["127.0.0.1:{port}"]\ninstances = {count + 64}\n']
            for tenant in range(number):
                path = directory / f"tenant-{tenant}.wasm"
                if not path.exists():
                    # A custom section of its own makes it another app.
                    path.write_bytes(marked.sealed(artifact, artifact + b"\0\x10\x07tenants" + secrets.token_bytes(8)))
                lines.append(f'[[tenant]]\nname = "t{tenant}"\napp = "{path}"\nhosts = ["t{tenant}.example"]\n')
            config = directory / "config.toml"
            config.write_text("\n".join(lines))
            return Server([contestants.BINARY, "serve", "--config", config], port, self.server_cores,
                          WORK / "logs/tenants.log", environment)  # fmt: skip

        def measure(number):
            with start(number) as server:
                seconds = max(server.wait_for("/", host=f"t{n}.example")[1] for n in (0, number - 1))
                for _ in range(20):
                    for tenant in range(number):
                        server.wait_for("/", host=f"t{tenant}.example")
                return server.memory(), seconds

        # The first start compiles what all apps share.
        measure(1)
        base, one = measure(1)
        _, first = measure(count)
        many, again = measure(count)
        shutil.rmtree(directory)
        further = (many - base) / (count - 1)
        return {
            "tenants": count, "base": base - further, "further": further,
            "load": (first - one) / (count - 1) * 1000, "restart": again * 1000,
        }  # fmt: skip


def cores(text):
    """Reads a set of processors: `0`, `0-3`, `0,2`."""
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def machine():
    """What the figures were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {
        "processor": model[0].partition(": ")[2] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{memory / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def say(text):
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def end_all(*_):
    """No server is left behind."""
    for server in list(Server.running):
        server.stop()


def main():
    units = [workload.name for workload in WORKLOADS] + ["interpreter", "tenants"]
    parser = argparse.ArgumentParser(description="Measures wsgi-wasm beside other servers.")
    parser.add_argument("--quick", action="store_true", help="one short round: a glance, not a result")
    parser.add_argument("--only", help=f"some of {','.join(units)}; the other results stay as they are")
    parser.add_argument("--peers", help=f"some of {','.join(peer.name for peer in PEERS)}")
    parser.add_argument("--name", help="name of the files in bench/results [default: full, or quick]")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the tables and plots again")
    parser.add_argument("--rounds", type=int, help="rounds over all servers [default: 5]")
    parser.add_argument("--seconds", type=int, help="time under load, each [default: 3]")
    parser.add_argument("--connections", type=int, default=16, help="open connections [default: 16]")
    parser.add_argument("--tenants", type=int, help="tenants to load [default: 50]")
    parser.add_argument("--server-cores", default="0", help="processors for the server [default: 0]")
    parser.add_argument("--load-cores", default="1", help="processors for wrk [default: 1]")
    parser.add_argument("--python", default=contestants.system_python(), help="for the native servers")
    parser.add_argument("--install-wasmtime", action="store_true", help="compile `wasmtime serve` if it is missing")
    parser.add_argument("--prepare", action="store_true", help="build all that is needed, and measure nothing")
    args = parser.parse_args()
    atexit.register(end_all)
    end_when_told()
    wanted = args.only.split(",") if args.only else units
    for name in wanted:
        if name not in units:
            parser.error(f"there is no `{name}` to measure, only {', '.join(units)}")
    require_wrk()
    tools = Tools(args.python, say)
    if args.install_wasmtime:
        tools.install_wasmtime()
    if args.prepare:
        for app in contestants.APPS:
            Run(args, tools).able(PEERS, app)
        return
    path = RESULTS / f"{args.name or ('quick' if args.quick else 'full')}.json"
    results = {}
    # A run of all begins anew; one of some adds to what is there.
    if path.exists() and (args.only or args.report):
        results = json.loads(path.read_text())
    if not args.report:
        run = Run(args, tools)
        results |= {"machine": machine(), "versions": tools.versions()}
        begin = time.monotonic()
        for name in wanted:
            say(f"{name}, after {time.monotonic() - begin:.0f} s")
            if name == "interpreter":
                measured = run.interpreter()
            elif name == "tenants":
                measured = run.tenancy()
            else:
                measured = run.workload(next(load for load in WORKLOADS if load.name == name))
            measured["ended"] = time.strftime("%Y-%m-%d %H:%M")
            results.setdefault("units", {})[name] = measured
            path.parent.mkdir(exist_ok=True)
            write_json(path, results)
    # It needs the plotting library, which is only there.
    report = Path(__file__).with_name("report.py")
    print(contestants.run([tools.venv / "bin/python", report, path]), end="")


if __name__ == "__main__":
    main()
