"""Many tenants on one server: starts, memory, disk, and the first request to each.

    python3 bench/many.py [--tenants 500] [--report]

One Flask app is built, and each tenant is a copy with another name in its
snapshot, which it answers with: as different for the host as any two apps with
the same requirements, but for the time to build them.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import marked
from measure import HERE, Server, free_port, run_settings, write_json

ROOT = HERE.parent
WORK = ROOT / "target/bench/many"


class Platform:
    """The tenants' files, and how to start a server of them."""

    def __init__(self, binary, tenants):
        self.binary, self.tenants = binary, tenants
        shutil.rmtree(WORK, ignore_errors=True)
        (WORK / "apps").mkdir(parents=True)
        built = marked.build_marked(binary, WORK / "built.wasm").read_bytes()
        self.app_bytes = len(built)
        for number in range(tenants):
            marked.copy(built, number, WORK / "apps" / f"{number}.wasm")
        self.cache = WORK / "cache"

    def start(self, label, tenants=None):
        port = free_port()
        lines = [f'[server]\nbind = ["127.0.0.1:{port}"]\n[defaults.instances]\nidle = "5s"\n']
        for number in range(self.tenants if tenants is None else tenants):
            app = WORK / "apps" / f"{number}.wasm"
            lines.append(f'[[tenant]]\nname = "t{number}"\napp = "{app}"\nhosts = ["t{number}.example"]\n')
        config = WORK / "wsgi-wasm.toml"
        config.write_text("\n".join(lines))
        environment = {"WSGI_WASM_CACHE": str(self.cache)}
        command = [self.binary, "serve", "--config", config]
        return Server(command, port, os.sched_getaffinity(0), WORK / "logs" / f"{label}.log", environment)


def wait_until_listening(server):
    """Seconds until the server says that it listens."""
    while "listening on" not in server.log.read_text(errors="replace"):
        if server.process.poll() is not None:
            raise SystemExit(server.log.read_text(errors="replace")[-2000:])
        time.sleep(0.005)
    return time.perf_counter() - server.begin


def disk(directory):
    """Bytes that the files below take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def ask_all(server, tenants):
    """Asks each tenant once; seconds that each took."""
    times = []
    for number in range(tenants):
        begin = time.perf_counter()
        status, body = server.get("/", host=f"t{number}.example")
        times.append(time.perf_counter() - begin)
        assert status == 200 and marked.name_of(number).encode() in body, f"tenant {number}: {status}"
    return times


def descriptors(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def settled(server):
    """Memory once it does not fall any more."""
    memory = server.memory()
    while True:
        time.sleep(2)
        now = server.memory()
        if now > memory * 0.99:
            return now
        memory = now


def measure(args):
    tenants = Platform(args.binary, args.tenants)
    figures = {"tenants": args.tenants, "app": tenants.app_bytes}
    say("one tenant, nothing cached")
    with tenants.start("one", 1) as server:
        figures["first start ever"] = wait_until_listening(server)
        figures["memory of one"] = settled(server)
        one = disk(tenants.cache)
    say("all tenants, only the first one cached")
    with tenants.start("cold") as server:
        figures["cold start"] = wait_until_listening(server)
        figures["compiling children's processor time"] = server.processor_seconds()
    figures["cache per tenant"] = (disk(tenants.cache) - one) / max(1, args.tenants - 1)
    starts = []
    for _ in range(args.starts):
        say("all tenants, all cached")
        with tenants.start("warm") as server:
            starts.append(wait_until_listening(server))
    figures["warm start"] = statistics.median(starts)
    figures["warm starts"] = starts
    with tenants.start("served") as server:
        wait_until_listening(server)
        figures["memory, loaded"] = settled(server)
        figures["descriptors, loaded"] = descriptors(server)
        for name in ("first", "second"):
            say(f"the {name} request to each")
            times = sorted(ask_all(server, args.tenants))
            figures[f"{name} request"] = {
                "p50": statistics.median(times), "p99": times[int(len(times) * 0.99)], "worst": times[-1],
            }  # fmt: skip
            if name == "first":
                # Before they have rested for too long.
                figures["memory, an instance each"] = server.memory()
        figures["descriptors, an instance each"] = descriptors(server)
        say("waiting until all instances are gone")
        time.sleep(7)
        figures["memory, at rest again"] = settled(server)
        times = sorted(ask_all(server, min(100, args.tenants)))
        figures["request that wakes"] = {"p50": statistics.median(times), "p99": times[int(len(times) * 0.99)]}
    shutil.rmtree(WORK, ignore_errors=True)
    return figures


def report(data, path):
    figures, settings = data["figures"], data["settings"]
    tenants = figures["tenants"]
    mega = lambda number: f"{number / 1e6:.1f} MB"  # noqa: E731
    each = lambda name: mega((figures[name] - figures["memory of one"]) / max(1, tenants - 1))  # noqa: E731
    ms = lambda seconds: f"{seconds * 1000:.1f} ms"  # noqa: E731
    first, second, wakes = figures["first request"], figures["second request"], figures["request that wakes"]
    rows = [
        ("an app's file", mega(figures["app"])),
        ("cache of each further tenant, on the disk", mega(figures["cache per tenant"])),
        ("first start ever, one tenant: the interpreter is compiled", f"{figures['first start ever']:.1f} s"),
        (f"start with {tenants} tenants that were never compiled", f"{figures['cold start']:.1f} s"),
        ("the same, each tenant", ms(figures["cold start"] / tenants)),
        (f"start with {tenants} tenants in the cache, to listening", f"{figures['warm start']:.2f} s"),
        ("the same, each tenant", ms(figures["warm start"] / tenants)),
        ("memory with one tenant", mega(figures["memory of one"])),
        (f"memory with {tenants} tenants, none asked yet", mega(figures["memory, loaded"])),
        ("the same, each further tenant", each("memory, loaded")),
        ("memory with an instance of each", mega(figures["memory, an instance each"])),
        ("the same, each further tenant", each("memory, an instance each")),
        ("memory when all instances are gone again", mega(figures["memory, at rest again"])),
        ("first request to a tenant, p50 / p99", f"{ms(first['p50'])} / {ms(first['p99'])}"),
        ("second request, p50 / p99", f"{ms(second['p50'])} / {ms(second['p99'])}"),
        ("request that wakes a tenant after its instances are gone, p50 / p99", f"{ms(wakes['p50'])} / {ms(wakes['p99'])}"),
        ("descriptors with all loaded / an instance of each",
         f"{figures['descriptors, loaded']} / {figures['descriptors, an instance each']}"),
    ]  # fmt: skip
    lines = [
        f"# {tenants} tenants on one server",
        "",
        f"Made by `bench/many.py` on {settings['machine']}, {settings['processors']} processors. Every tenant is a Flask "
        "app with another name in its snapshot, which it is asked for: a copy of one that was built. Memory is the "
        "proportional set size. Each request is on a connection of its own, by a client in Python.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines))


def say(text):
    print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=500)
    parser.add_argument("--starts", type=int, default=5, help="warm starts")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/wsgi-wasm")
    parser.add_argument("--name", default="many")
    parser.add_argument("--report", action="store_true", help="only make the table again")
    args = parser.parse_args()
    path = HERE / "results" / args.name
    path.parent.mkdir(exist_ok=True)
    if not args.report:
        write_json(path.with_suffix(".json"), {"settings": run_settings(), "figures": measure(args)})
    report(json.loads(path.with_suffix(".json").read_text()), path)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
