"""Compares the ways to lay out an app's code: whole, split and merged.

    python3 bench/sharing.py APP.wasm SECOND.wasm [--apps N] [--rounds N]

APP serves the requests (to `/hello`), SECOND is loaded when its skeleton is
compiled already. Rounds are interleaved, and the figures are medians. Needs
wrk, the release build, and its tests (`cargo test --release --no-run`).
"""

import argparse
import glob
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time

WAYS = ("whole", "split", "merged")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BINARY = os.path.join(ROOT, "target/release/wsgi-wasm")


def serve(app, way, *options):
    """Starts a server; returns it, its address and the time to readiness."""
    start = time.perf_counter()
    server = subprocess.Popen(
        [BINARY, "serve", app, "--code", way, "--bind", "127.0.0.1:0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    line = server.stdout.readline()
    return server, line.split()[-1], time.perf_counter() - start


def stop(server):
    server.send_signal(signal.SIGTERM)
    server.wait()


def first_load(cache, app, way):
    """From bytes to ready, with all in the cache but the app's own code."""
    shutil.rmtree(os.path.join(cache, "compiled-v2"), ignore_errors=True)
    server, _, seconds = serve(app, way)
    stop(server)
    return seconds


def processor_time(server):
    """Seconds of all cores that the server has used."""
    with open(f"/proc/{server.pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def requests(app, way, isolation, seconds):
    """Requests per second of one client, and processor time of a request."""
    server, address, _ = serve(app, way, "--isolation", isolation)
    command = ["wrk", "-t1", "-c1", f"-d{seconds}s", address + "/hello"]
    subprocess.run([*command[:3], "-d1s", command[4]], capture_output=True, check=True)
    before = processor_time(server)
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    used = processor_time(server) - before
    stop(server)
    assert "Non-2xx" not in output, output
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1])
    return rate, used / int(re.search(r"(\d+) requests in", output)[1])


def many(apps, way):
    """Time and memory of many apps in one process."""
    name = "time_and_memory_of_many_apps"
    for test in glob.glob(os.path.join(ROOT, "target/release/deps/wsgi_wasm-*")):
        if os.access(test, os.X_OK) and not test.endswith((".so", ".d")):
            listed = subprocess.run([test, "--list", "--ignored"], capture_output=True, text=True)
            if name in listed.stdout:
                break
    else:
        raise SystemExit("run `cargo test --release --no-run` first")
    environment = {**os.environ, "MEASURE_CODE": way, "MEASURE_APPS": ":".join(apps)}
    command = [test, "--ignored", "--nocapture", name]
    output = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", output.stdout)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("app")
    parser.add_argument("second")
    parser.add_argument("--apps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    args = parser.parse_args()
    figures = {}

    def show():
        for name, ways in figures.items():
            medians = (f"{statistics.median(ways[way]):12.1f}" for way in WAYS)
            print(f"{name:44}" + "".join(medians), flush=True)
        figures.clear()

    print(f"{'':44}" + "".join(f"{way:>12}" for way in WAYS))

    def note(name, way, value):
        figures.setdefault(name, {}).setdefault(way, []).append(value)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["WSGI_WASM_CACHE"] = cache
        for way in WAYS:
            note("first app (ms)", way, first_load(cache, args.app, way) * 1000)
            first_load(cache, args.second, way)
            entries = glob.glob(os.path.join(cache, "compiled-v2/*/*.cwasm"))
            note("machine code of a further app (kB)", way, os.path.getsize(entries[0]) / 1000)
        for _ in range(args.rounds):
            for way in WAYS:
                # Compiling whole takes seconds each time; twice is enough.
                name = "further app, bytes to ready (ms)"
                if way != "whole" or len(figures.get(name, {}).get(way, ())) < 2:
                    note(name, way, first_load(cache, args.second, way) * 1000)
        show()
        for _ in range(args.rounds):
            for way in WAYS:
                server, _, seconds = serve(args.app, way)
                stop(server)
                note("warm start (ms)", way, seconds * 1000)
                for isolation in ("request", "tenant"):
                    rate, used = requests(args.app, way, isolation, args.seconds)
                    note(f"hello, isolation {isolation} (requests/s)", way, rate)
                    note(f"hello, isolation {isolation} (us of processor)", way, used * 1e6)
        show()
        copies = []
        with open(args.app, "rb") as file:
            content = file.read()
        for number in range(args.apps):
            # A custom section makes another app of it.
            path = os.path.join(cache, f"copy-{number}.wasm")
            with open(path, "wb") as file:
                file.write(content + bytes([0, 3, 1, ord("n"), number]))
            copies.append(path)
        for way in WAYS:
            count = args.apps if way != "whole" else min(args.apps, 4)
            for copy in copies[:count]:
                stop(serve(copy, way)[0])
        for _ in range(args.rounds):
            for way in WAYS:
                count = args.apps if way != "whole" else min(args.apps, 4)
                for key, value in many(copies[:count], way).items():
                    if key.endswith("_kb"):
                        value /= count
                        key += " per app"
                    note(key, way, value)
        show()


if __name__ == "__main__":
    main()
