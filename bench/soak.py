"""Mixed load for a long time, with deploys, kills and reloads every few seconds.

    python3 bench/soak.py --minutes 60

Counts every request. None but those that were meant to be killed may fail, the
server's memory has to stay flat, and in the end no instance and no descriptor
may be left over. Takes about half a processor. Exit status 1 if any of that
does not hold.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import marked
from measure import HERE, Server, end_when_told, free_port, pyplot, run_settings, write_json

ROOT = HERE.parent
WORK = ROOT / "target/bench/soak"
# Tenants under load, of which each must answer all requests.
STEADY = ("one", "two", "three")
# Whose requests may end badly, in these ways.
KILLED = "killed"
KILLS = ("/trap", "/spin", "/stubborn", "/allocate", "/sleep")
ENDS = frozenset({500, 503, 504})
# What the log may hold at the level of errors.
EXPECTED_ERRORS = ("app=killed", "tenant=broken", "tenant=two")


def open_files(process):
    """What its descriptors are of."""
    files = []
    for link in Path(f"/proc/{process}/fd").iterdir():
        # It may be closed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            files.append(os.readlink(link))
    return files


class Soak:
    """The run: what is asked, and what came of it."""

    def __init__(self, args):
        self.args = args
        self.random = random.Random(args.seed)
        self.counts = collections.Counter()
        self.wrong = []
        self.samples = []
        self.over = False
        self.directory = Path(tempfile.mkdtemp(prefix="soak-"))
        self.port = free_port()
        self.rounds = 0
        self.names = {name: set() for name in STEADY}

    # === The server ===

    def prepare(self):
        WORK.mkdir(parents=True, exist_ok=True)
        # A copy: whoever builds meanwhile changes nothing.
        self.binary = self.directory / "wsgi-wasm"
        shutil.copy(self.args.binary, self.binary)
        built = marked.build_marked(self.binary, WORK / "built.wasm").read_bytes()
        self.versions = [self.directory / f"version-{number}.wasm" for number in range(6)]
        for number, path in enumerate(self.versions):
            marked.copy(built, number, path)
        self.hostile = marked.build(self.binary, ROOT / "tests/hostile/python", self.directory / "hostile.wasm", "/hello")
        self.broken = self.directory / "broken.wasm"
        self.broken.write_bytes(built[: len(built) // 2])
        for name in STEADY:
            (self.directory / f"data-{name}").mkdir()
        self.configure()

    def configure(self):
        """Writes the configuration; each time it is a little different."""
        self.rounds += 1
        lines = [
            "[server]", 'control = "unix:control.sock"', f'bind = ["127.0.0.1:{self.port}"]',
            "[defaults.instances]", 'idle = "5s"',
        ]  # fmt: skip
        for number, name in enumerate(STEADY):
            lines += [
                "[[tenant]]", f'name = "{name}"', f'app = "{self.versions[number]}"', f'hosts = ["{name}.example"]',
                f'data = {{ path = "data-{name}", quota = "64MiB" }}', 'health = "/"',
                f'instances = {{ max = 4, requests = 500 }}', 'limits = { queue_wait = "20s" }',
            ]  # fmt: skip
            if name == "three":
                lines += [f'env = {{ ROUND = "{self.rounds}" }}', 'isolation = "request"']
        lines += [
            "[[tenant]]", f'name = "{KILLED}"', f'app = "{self.hostile}"', f'hosts = ["{KILLED}.example"]',
            'limits = { timeout = "1s" }', "instances = { max = 3 }",
        ]  # fmt: skip
        if self.rounds % 2:
            lines += ["[[tenant]]", 'name = "guest"', f'app = "{self.versions[5]}"', 'hosts = ["guest.example"]']
        path = self.directory / "wsgi-wasm.toml"
        scratch = path.with_suffix(".new")
        scratch.write_text("\n".join(lines) + "\n")
        scratch.rename(path)

    async def control(self, *arguments):
        """Runs `ctl`; its exit status and output."""
        command = [self.binary, "ctl", "--control", f"unix:{self.directory / 'control.sock'}", *map(str, arguments)]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    async def tenants(self):
        status, output = await self.control("list", "--json")
        if status != 0:
            raise RuntimeError(f"ctl list: {output}")
        return {tenant["name"]: tenant for tenant in json.loads(output)}

    # === The load ===

    async def request(self, connection, name, method, path, body=b"", expected=frozenset({200})):
        """One request on a connection that is kept open; the body of the answer."""
        self.counts["sent"] += 1
        try:
            reader, writer = connection.stream or await connection.open(self.port)
            head = f"{method} {path} HTTP/1.1\r\nHost: {name}.example\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            status, answer, closes = await asyncio.wait_for(read_response(reader), 60)
        except (OSError, EOFError, asyncio.TimeoutError, ValueError) as error:
            connection.close()
            return self.failed(name, path, repr(error))
        if closes:
            connection.close()
        if status not in expected:
            return self.failed(name, path, f"{status} {answer[:100]!r}")
        self.counts["answered"] += 1
        return answer

    def failed(self, name, path, what):
        self.counts["wrong"] += 1
        if len(self.wrong) < 100:
            self.wrong.append(f"{time.time() - self.began:.1f} s: {name} {path}: {what}")
            print("WRONG", self.wrong[-1], flush=True)

    async def steady(self, name):
        """Requests of all kinds, each of which must succeed."""
        connection = Connection()
        while not self.over:
            await asyncio.sleep(self.random.expovariate(self.args.rate / len(STEADY) / 3))
            kind = self.random.random()
            if kind < 0.6:
                answer = await self.request(connection, name, "GET", "/")
            elif kind < 0.75:
                size = self.random.choice((10, 10_000, 300_000))
                answer = await self.request(connection, name, "POST", "/count", b"x" * size)
                if answer is not None and not answer.endswith(f" {size}".encode()):
                    self.failed(name, "/count", repr(answer))
            elif kind < 0.9:
                answer = await self.request(connection, name, "GET", "/stream")
                if answer is not None and answer.count(b"\n") != 100:
                    self.failed(name, "/stream", f"{len(answer)} bytes")
            else:
                answer = await self.request(connection, name, "POST", "/note", b"a note")
            if answer is not None:
                start = answer.find(b"tenant-")
                self.names[name].add(answer[start : start + 15].decode())
        connection.close()

    async def leave(self):
        """Clients that leave in the middle of a response."""
        while not self.over:
            await asyncio.sleep(self.random.uniform(0.5, 2))
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                name = self.random.choice(STEADY)
                writer.write(f"GET /stream HTTP/1.1\r\nHost: {name}.example\r\n\r\n".encode())
                await writer.drain()
                await reader.read(self.random.choice((1, 300)))
                writer.close()
                self.counts["left"] += 1
            except OSError as error:
                self.failed("leave", "/stream", repr(error))

    # === The trouble ===

    async def kill(self):
        """Requests that end an instance."""
        while not self.over:
            await asyncio.sleep(self.random.uniform(0.5, 4))
            connection = Connection()
            if await self.request(connection, KILLED, "GET", self.random.choice(KILLS), expected=ENDS) is not None:
                self.counts["killed"] += 1
            # An app that only crashes is soon not asked any more.
            await self.request(connection, KILLED, "GET", "/hello", expected=ENDS | {200})
            connection.close()

    async def deploy(self):
        """New versions, the ones before, and some that do not work."""
        while not self.over:
            await asyncio.sleep(self.random.uniform(2, 6))
            name = self.random.choice(STEADY[:2])
            what = self.random.random()
            if what < 0.6:
                status, output = await self.control("deploy", name, self.random.choice(self.versions))
                expected = 0
            elif what < 0.85:
                status, output = await self.control("rollback", name)
                expected = 0
                if "no version" in output:
                    continue
            else:
                status, output = await self.control("deploy", "two", self.broken)
                expected = 2
            self.counts["deploys"] += 1
            if status != expected:
                self.failed("ctl", name, f"{status}: {output}")

    async def reload(self, server):
        """Changes to the configuration, by a signal or by `ctl`."""
        while not self.over:
            await asyncio.sleep(self.random.uniform(5, 12))
            self.configure()
            self.counts["reloads"] += 1
            if self.random.random() < 0.5:
                os.kill(server.process.pid, signal.SIGHUP)
            else:
                status, output = await self.control("reload")
                if status != 0:
                    self.failed("ctl", "reload", output)

    # === What is watched ===

    async def watch(self, server):
        while not self.over:
            await asyncio.sleep(self.args.sample)
            await self.sample(server)

    async def sample(self, server):
        tenants = await self.tenants()
        files = open_files(server.process.pid)
        # The memory of an app, mapped from its file: one for each version that is
        # loaded. The one before is kept to roll back to.
        images = sum(file.endswith("/tenant.cwasm") for file in files)
        sample = {
            "seconds": time.time() - self.began,
            "pss": server.memory(),
            "descriptors": len(files) - images,
            "images": images,
            "threads": len(os.listdir(f"/proc/{server.process.pid}/task")),
            "in work": sum(tenant["in_work"] for tenant in tenants.values()),
            "resting": sum(tenant["resting"] for tenant in tenants.values()),
            "held": sum(tenant["memory"] for tenant in tenants.values()),
            "cpu": server.processor_seconds(),
            **self.counts,
        }
        self.samples.append(sample)
        print(
            f"{sample['seconds']:7.0f} s  {sample['pss'] / 1e6:6.1f} MB  {sample['descriptors']:4} fds "
            f"{sample['in work']:3} in work {sample['resting']:3} at rest  {dict(self.counts)}",
            flush=True,
        )
        return sample

    async def run(self, server):
        self.began = time.time()
        await asyncio.sleep(1)
        first = await self.sample(server)
        tasks = [self.steady(name) for name in STEADY for _ in range(3)]
        tasks += [self.leave(), self.kill(), self.kill(), self.deploy(), self.reload(server), self.watch(server)]
        running = [asyncio.create_task(task) for task in tasks]
        await asyncio.sleep(self.args.minutes * 60)
        self.over = True
        await asyncio.gather(*running)
        # All that is at work ends, and what rests goes.
        for _ in range(60):
            await asyncio.sleep(1)
            last = await self.sample(server)
            if last["in work"] == 0 and last["resting"] == 0 and last["descriptors"] <= first["descriptors"]:
                break
        return first, last

    def judge(self, first, last, server):
        """All that is wrong."""
        found = list(self.wrong)
        if self.counts["wrong"] > len(found):
            found.append(f"and {self.counts['wrong'] - len(found)} more")
        if last["in work"] or last["resting"]:
            found.append(f"instances are left: {last['in work']} at work, {last['resting']} at rest")
        if last["descriptors"] > first["descriptors"] + 2:
            found.append(f"descriptors are left: {first['descriptors']} before, {last['descriptors']} after")
        if last["images"] > 2 * first["images"]:
            found.append(f"versions are left: {first['images']} before, {last['images']} after")
        # The first fifth fills caches and pools.
        samples = [sample["pss"] for sample in self.samples if "sent" in sample]
        fifth = max(1, len(samples) // 5)
        early, late = statistics.median(samples[fifth : 2 * fifth] or samples), statistics.median(samples[-fifth:])
        if late > early * 1.1 and late > early + 10e6:
            found.append(f"memory grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB")
        for name, names in self.names.items():
            if not all(seen.startswith("tenant-0000000") for seen in names):
                found.append(f"{name} answered as {sorted(names)}")
        log = server.log.read_text(errors="replace")
        for line in log.splitlines():
            is_error = " ERROR " in line and not any(text in line for text in EXPECTED_ERRORS)
            if "panicked" in line or is_error:
                found.append(f"in the log: {line}")
        return found


class Connection:
    """A connection that is opened when it is needed."""

    def __init__(self):
        self.stream = None

    async def open(self, port):
        self.stream = await asyncio.open_connection("127.0.0.1", port)
        return self.stream

    def close(self):
        if self.stream:
            self.stream[1].close()
        self.stream = None


async def read_response(reader):
    """A whole response: status, body, and whether the connection ends."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    fields = dict(line.split(": ", 1) for line in head[1:] if line)
    status = int(head[0].split()[1])
    if fields.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    else:
        body = await reader.readexactly(int(fields["content-length"]))
    return status, body, fields.get("connection") == "close"


def report(data, path):
    samples, counts, settings = data["samples"], data["counts"], data["settings"]
    loaded = [sample for sample in samples if "sent" in sample]
    pss = [sample["pss"] / 1e6 for sample in loaded]
    verdict = "Nothing was wrong." if not data["wrong"] else "**Wrong:**\n\n" + "\n".join(f"- {one}" for one in data["wrong"])
    seconds = loaded[-1]["seconds"] - loaded[0]["seconds"]
    cpu = (loaded[-1]["cpu"] - loaded[0]["cpu"]) / seconds if seconds else 0
    lines = [
        f"# {settings['minutes']:g} minutes of mixed load with deploys and kills",
        "",
        f"Made by `bench/soak.py` on {settings['machine']}, {settings['processors']} processors; the server took "
        f"{cpu:.2f} of one.",
        "",
        verdict,
        "",
        "| | |",
        "|---|---|",
        f"| requests that must succeed, and kills | {counts['sent']} |",
        f"| answered as they should be | {counts['answered']} |",
        f"| of them meant to kill: traps, endless loops, exhausted memory | {counts.get('killed', 0)} |",
        f"| answered wrongly, or not at all | {counts.get('wrong', 0)} |",
        f"| clients that left in the middle | {counts.get('left', 0)} |",
        f"| deploys and rollbacks, some of a broken app | {counts.get('deploys', 0)} |",
        f"| reloads with a changed configuration | {counts.get('reloads', 0)} |",
        f"| memory (PSS) after a fifth of the time / at the end | {pss[len(pss) // 5]:.1f} / {pss[-1]:.1f} MB |",
        f"| least and most memory since then | {min(pss[len(pss) // 5:]):.1f} to {max(pss[len(pss) // 5:]):.1f} MB |",
        f"| descriptors before the load / after it | {samples[0]['descriptors']} / {samples[-1]['descriptors']} |",
        *(
            f"| versions loaded before the load / after it | {before['images']} / {after['images']} |"
            for before, after in [(samples[0], samples[-1])]
            if "images" in before
        ),
        f"| instances after it | {samples[-1]['in work'] + samples[-1]['resting']} |",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(lines))
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    minutes = [sample["seconds"] / 60 for sample in loaded]
    axes.plot(minutes, pss, color="#1f6fb4", linewidth=1)
    axes.set_ylim(0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("memory of the server (PSS), MB")
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=60, help="requests in a second")
    parser.add_argument("--sample", type=float, default=10, help="seconds between two looks at the server")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/wsgi-wasm")
    parser.add_argument("--name", default="soak")
    parser.add_argument("--report", action="store_true", help="only make the table and the plot again")
    args = parser.parse_args()
    path = HERE / "results" / args.name
    path.parent.mkdir(exist_ok=True)
    if args.report:
        report(json.loads(path.with_suffix(".json").read_text()), path)
        return
    end_when_told()
    soak = Soak(args)
    try:
        soak.prepare()
        command = [soak.binary, "serve", "--config", soak.directory / "wsgi-wasm.toml"]
        log = WORK / "log"
        with Server(command, soak.port, os.sched_getaffinity(0), log, directory=soak.directory) as server:
            for name in itertools.chain(STEADY):
                server.wait_for("/", host=f"{name}.example")
            first, last = asyncio.run(soak.run(server))
            server.process.send_signal(signal.SIGTERM)
            status = server.process.wait(60)
            found = soak.judge(first, last, server)
            if status != 0:
                found.append(f"the server ended with status {status}")
    finally:
        shutil.rmtree(soak.directory, ignore_errors=True)
    made_with = run_settings(minutes=args.minutes, rate=args.rate, seed=args.seed)
    data = {"settings": made_with, "counts": soak.counts, "wrong": found, "samples": soak.samples}
    write_json(path.with_suffix(".json"), data)
    report(data, path)
    print(path.with_suffix(".md").read_text())
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
