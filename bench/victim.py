"""A tenant's latency next to an idle neighbour and next to hostile ones, on one server.

    python3 bench/victim.py [--only spin,churn] [--rounds 5] [--seconds 5]

Each attack runs on a server of its own, in rounds: the neighbour rests, then it
attacks. Figures are medians of all rounds. The victim is asked at a fixed rate,
and what waits because an earlier answer is late counts too.

The server has all processors, and so have the clients. The one that measures
has real-time priority where that is allowed: what is measured is the server,
not how long the client waits for a processor. Those that attack get what the
server leaves.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from measure import Server, end_when_told, free_port, pyplot, run_settings, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "target/bench/victim"
HOSTILE = ROOT / "tests/hostile"
VICTIM, ATTACKER = "victim.example", "attacker.example"
# Connections that attack at a time: as many as a tenant has instances.
ATTACKERS = 16


# === What the victim gets ===


def ask(rate, seconds, connections, port, results):
    """Asks the victim `rate` times a second; seconds that each answer took.

    Its process goes before all others where that is allowed: it stands for
    another machine.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    begin = time.perf_counter() + 0.1
    request = f"GET / HTTP/1.1\r\nHost: {VICTIM}\r\n\r\n".encode()
    times, failures = [], []

    def connection(index):
        sock = None
        free_at = 0.0
        for number in itertools.count(index, connections):
            due = begin + number / rate
            if due > begin + seconds:
                break
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            # A client that wakes up late is not the server's fault; one that is
            # late because it still had to wait for an answer is.
            start = due if free_at > due else time.perf_counter()
            try:
                if sock is None:
                    sock = socket.create_connection(("127.0.0.1", port), 30)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(request)
                status, closes = read_response(sock)
                if status != 200:
                    failures.append(status)
                if closes:
                    sock.close()
                    sock = None
            except OSError as error:
                failures.append(str(error))
                sock = None
            free_at = time.perf_counter()
            times.append(free_at - start)

    threads = [threading.Thread(target=connection, args=(index,)) for index in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put((times, failures))


def read_response(sock):
    """Reads a response with a Content-Length; its status, and whether the connection ends."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (part := sock.recv(65536)):
            raise ConnectionError("closed early")
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    fields = dict(line.split(b": ", 1) for line in lines[1:])
    left = int(fields.get(b"content-length", 0)) - len(body)
    while left > 0:
        if not (part := sock.recv(65536)):
            raise ConnectionError("closed early")
        left -= len(part)
    return int(lines[0].split()[1]), fields.get(b"connection") == b"close"


# === What the attacker does ===


def repeat(path):
    """Asks for `path`, reads the answer, asks again."""
    return exchange(f"GET {path} HTTP/1.1\r\nHost: {ATTACKER}\r\nConnection: close\r\n\r\n".encode())


def post(body):
    """The same with a body, for the raw guest."""
    head = f"POST / HTTP/1.1\r\nHost: {ATTACKER}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return exchange(head.encode() + body)


def exchange(request):
    """Sends `request` on a connection of its own, and takes what comes, to its end."""

    async def attack(connect, count):
        async with connect() as (reader, writer):
            writer.write(request)
            await drain(reader)
        count()

    return attack


def keep_alive(path):
    """As fast as it goes, on connections that stay."""
    request = f"GET {path} HTTP/1.1\r\nHost: {ATTACKER}\r\n\r\n".encode()

    async def attack(connect, count):
        async with connect() as (reader, writer):
            closes = False
            while not closes:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                closes = b"\r\nconnection: close" in head
                _, _, length = head.partition(b"\r\ncontent-length: ")
                await reader.readexactly(int(length.split(b"\r")[0]))
                count()

    return attack


async def endless_body(connect, count):
    """Sends a body that does not end, as slowly as is just allowed."""
    head = f"POST /read-slowly HTTP/1.1\r\nHost: {ATTACKER}\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with connect() as (_, writer):
        writer.write(head.encode())
        while True:
            writer.write(b"1\r\nx\r\n" * 100)
            await writer.drain()
            await asyncio.sleep(0.02)
            count()


async def slow_reader(connect, count):
    """Takes a response that does not end a little at a time."""
    async with connect() as (reader, writer):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        writer.write(f"GET /endless?100000 HTTP/1.1\r\nHost: {ATTACKER}\r\n\r\n".encode())
        while await reader.read(1000):
            await asyncio.sleep(0.05)
            count()


async def headers(connect, count):
    """Heads as large as they may be, and larger."""
    field = b"X-Header-%d: " + b"x" * 250 + b"\r\n"
    fields = b"".join(field % number for number in range(95))
    request = f"GET /hello HTTP/1.1\r\nHost: {ATTACKER}\r\n".encode() + fields
    for ends in (b"\r\n", field * 10 + b"\r\n"):
        async with connect() as (reader, writer):
            writer.write(request + ends)
            writer.write_eof()
            await drain(reader)
        count()


async def trailers(connect, count):
    """Trailers of a megabyte behind a body of nothing."""
    head = f"POST /read-slowly HTTP/1.1\r\nHost: {ATTACKER}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    async with connect() as (reader, writer):
        writer.write(head.encode())
        for _ in range(100):
            writer.write(b"X-Trailer: x\r\n" * 700)
            await writer.drain()
            give_way()
        writer.write(b"\r\n")
        await drain(reader)
    count()


async def connections(connect, count):
    """Connects and leaves, in the middle of a head."""
    async with connect() as (_, writer):
        writer.write(b"GET / HT")
    count()


async def drain(reader):
    while await reader.read(65536):
        give_way()


def give_way():
    """Lets the server go on. The kernel looks at whose turn it is only when one
    sleeps, at its tick, or here: before, the idlest thread has some milliseconds
    each time that another was preempted by the one that measures."""
    os.sched_yield()


def order(operation, first=0, length=0, times=1, number=0):
    """One order for the guest `puppet`; see there."""
    numbers = (operation, first, length, 0, 0, times, 1, 0)
    return b"".join(n.to_bytes(4, "little") for n in numbers) + number.to_bytes(8, "little") + bytes(8)


TABLES = order(18, length=1000, times=1_000_000)
FILL = order(17, length=1500) + order(19, first=1 << 20, length=90 << 20, times=1 << 30)
PILE = order(8, number=1, times=900) + order(10, first=1 << 17, length=50, times=1 << 30)

# Name: what it is, what the attacker's client does, and what is different in
# its settings.
ATTACKS = {
    "idle": ("the neighbour rests here, too", None, {}),
    "spin": ("busy loop in every instance", repeat("/spin"), {}),
    "short": ("requests of 3 ms each", keep_alive("/short-spin?3"), {}),
    "hello": ("requests of next to nothing", keep_alive("/hello"), {}),
    "regex": ("regular expression without end", repeat("/regular-expression"), {}),
    "number": ("one instruction that takes minutes", repeat("/large-number"), {}),
    "hash": ("key derivations", repeat("/derive-keys"), {}),
    "allocate": ("memory to the limit, by MemoryError", repeat("/allocate"), {}),
    "churn": ("80 MiB dirtied by each request", repeat("/churn?80"), {}),
    "tables": ("tables that grow", post(TABLES), {"app": "puppet"}),
    "fill": ("memory.fill of 90 MiB, again and again", post(FILL), {"app": "puppet"}),
    "polls": ("polls in a loop", post(PILE), {"app": "puppet"}),
    "random": ("random bytes by the megabyte", repeat("/hoard-random?1000000"), {}),
    "trap": ("traps", repeat("/trap"), {}),
    "fresh": ("an instance for each request", keep_alive("/hello"), {"isolation": "request"}),
    "fresh-memory": ("the same, each with 40 MiB", keep_alive("/churn?40"), {"isolation": "request"}),
    "tiny": ("writes of one byte", repeat("/tiny-writes?1000000"), {}),
    "endless": ("responses without end", repeat("/endless?100000"), {}),
    "log": ("lines for the log", keep_alive("/chatter?1000"), {}),
    "log-long": ("long lines for the log", keep_alive("/long-line?100000"), {}),
    "body": ("request bodies without end", endless_body, {}),
    "reader": ("clients that read slowly", slow_reader, {}),
    "headers": ("heads as large as may be", headers, {}),
    "trailers": ("trailers of a megabyte", trailers, {}),
    "connections": ("connections that come and go", connections, {}),
    "recurse": ("recursion in Python", keep_alive("/recurse"), {}),
    "recurse-c": ("recursion in C, to the end of the stack", repeat("/recurse-in-c"), {}),
    "tmp": ("/tmp filled with files", keep_alive("/fill-tmp?10000"), {}),
    "disk": ("/data filled with files", keep_alive("/fill-data?10000"), {"data": True}),
    "disk-churn": ("files made, synced and removed", keep_alive("/churn-data?20"), {"data": True}),
    "dns": ("names looked up", keep_alive("/look-up?50"), {"network": ["*.invalid:80"]}),
    "connect": ("connections of the app", keep_alive("/connect?60"), {"network": ["127.0.0.1:*"]}),
}


def attack(name, port, over, total, connections):
    """One of the attacker's clients, for some of its connections. They stand for other
    machines, so that they get what the server leaves.

    Each has one thread, which counts among the server's threads, see `Server`: the
    kernel owes each thread that waited for long some milliseconds of a processor,
    however idle it is to be, and so many threads a tenth of a second.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    done = 0

    def count():
        nonlocal done
        done += 1
        give_way()

    async def work(index):
        @contextlib.asynccontextmanager
        async def connect():
            # From an address of its own: from a single one, ports would run out.
            source = (f"127.0.1.{index + 1}", 0)
            give_way()
            streams = await asyncio.open_connection("127.0.0.1", port, local_addr=source, limit=4096)
            try:
                yield streams
            finally:
                streams[1].close()

        while True:
            try:
                await ATTACKS[name][1](connect, count)
            except (OSError, EOFError):
                # What breaks it is part of the game.
                await asyncio.sleep(0.001)

    async def all_of_them():
        tasks = [asyncio.create_task(work(index)) for index in connections]
        await asyncio.to_thread(over.wait)
        with total.get_lock():
            total.value += done
        del tasks
        # In the middle of what it does.
        os._exit(0)

    asyncio.run(all_of_them())


# === The server ===


class Apps:
    """The built apps."""

    def __init__(self, binary):
        WORK.mkdir(parents=True, exist_ok=True)
        self.binary = binary
        self.victim = self.build("victim", HERE / "apps/flask", "/", "/books/3")
        self.hostile = self.build("hostile", HOSTILE / "python", "/hello")
        self.puppet = self.assemble("puppet")

    def build(self, name, directory, *warmup):
        output = WORK / f"{name}.wasm"
        warm = itertools.chain.from_iterable(("--warmup", path) for path in warmup)
        command = [self.binary, "build", "--dir", directory, *warm, "-o", output]
        subprocess.run(command, check=True, capture_output=True)
        return output

    def assemble(self, name):
        raw = HOSTILE / "raw"
        guest = (raw / "memory.wat").read_text() + (raw / f"{name}.wat").read_text()
        text = (raw / "frame.wat").read_text().replace(";; GUEST", guest)
        target = WORK / "assemble"
        manifest = HOSTILE / "assemble/Cargo.toml"
        cargo = ["cargo", "build", "--release", "--quiet", "--locked", "--manifest-path", manifest]
        subprocess.run([*cargo, "--target-dir", target], check=True)
        output = WORK / f"{name}.wasm"
        done = subprocess.run([target / "release/assemble"], input=text.encode(), check=True, stdout=subprocess.PIPE)
        output.write_bytes(done.stdout)
        return output


def configuration(apps, settings, directory):
    """Two tenants with the limits that a platform would have."""
    app = apps.puppet if settings.get("app") == "puppet" else apps.hostile
    # What the app connects to: the server itself.
    lines = [
        "[defaults.limits]", 'timeout = "10s"',
        "[[tenant]]", 'name = "victim"', f'app = "{apps.victim}"', f'hosts = ["{VICTIM}"]',
        "[[tenant]]", 'name = "attacker"', f'app = "{app}"', f'hosts = ["{ATTACKER}"]',
        f'isolation = "{settings.get("isolation", "tenant")}"', f'env = {{ PORT = "{settings["port"]}" }}',
    ]  # fmt: skip
    if "network" in settings:
        lines.append(f"network = {json.dumps(settings['network'])}")
    if "data" in settings:
        data = directory / "data"
        data.mkdir()
        lines.append(f'data = {{ path = "{data}", quota = "64MiB", files = 5000 }}')
    path = directory / "wsgi-wasm.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def percentile(times, part):
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def measure(args, port, spawn):
    """Asks the victim for a while; p50 and p99 in milliseconds, and its failures."""
    results = spawn.Queue()
    asking = spawn.Process(
        target=ask, args=(args.rate, args.seconds, args.connections, port, results), daemon=True
    )
    asking.start()
    times, failures = results.get()
    asking.join()
    return {
        "p50": percentile(times, 0.5) * 1000,
        "p99": percentile(times, 0.99) * 1000,
        "worst": max(times) * 1000,
        "requests": len(times),
        "failures": len(failures),
    }


def run(args, apps, name):
    """All rounds next to one attacker."""
    spawn = multiprocessing.get_context("spawn")
    directory = Path(tempfile.mkdtemp(prefix="victim-"))
    port = free_port()
    config = configuration(apps, {**ATTACKS[name][2], "port": port}, directory)
    command = [apps.binary, "serve", "--config", config, "--bind", f"127.0.0.1:{port}"]
    log = WORK / "logs" / f"{name}.log"
    rounds = {"idle": [], "hostile": []}
    attacks = 0
    try:
        with Server(command, port, os.sched_getaffinity(0), log, own_session=False) as server:
            server.wait_for("/", host=VICTIM)
            for _ in range(50):
                server.get("/", host=VICTIM)
            for _ in range(args.rounds):
                rounds["idle"].append(measure(args, port, spawn))
                over, total = spawn.Event(), spawn.Value("L")
                clients = range(os.cpu_count() if ATTACKS[name][1] else 0)
                attackers = [
                    spawn.Process(
                        target=attack,
                        args=(name, port, over, total, range(ATTACKERS)[client :: len(clients)]),
                        daemon=True,
                    )
                    for client in clients
                ]
                for attacker in attackers:
                    attacker.start()
                time.sleep(1)
                used = server.processor_seconds()
                rounds["hostile"].append(measure(args, port, spawn))
                rounds["hostile"][-1]["cpu"] = (server.processor_seconds() - used) / args.seconds
                over.set()
                for attacker in attackers:
                    attacker.join()
                attacks += total.value
                # What is still at work comes to its end.
                calm(server, port)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return {"what": ATTACKS[name][0], "rounds": rounds, "attacks": attacks}


def calm(server, port):
    """Waits until the server computes nothing more."""
    for _ in range(60):
        before = server.processor_seconds()
        time.sleep(0.5)
        if server.processor_seconds() - before < 0.05:
            return


# === The report ===


def medians(result):
    def median(kind, figure):
        return statistics.median(one[figure] for one in result["rounds"][kind])

    idle, hostile = median("idle", "p99"), median("hostile", "p99")
    return {
        "idle p50": median("idle", "p50"),
        "idle p99": idle,
        "hostile p50": median("hostile", "p50"),
        "hostile p99": hostile,
        "ratio": hostile / idle,
        "worst": max(one["worst"] for one in result["rounds"]["hostile"]),
        "failures": sum(one["failures"] for kind in ("idle", "hostile") for one in result["rounds"][kind]),
        "cpu": median("hostile", "cpu"),
    }


def report(data, path):
    settings = data["settings"]
    lines = [
        "# A tenant's latency next to hostile neighbours",
        "",
        f"Made by `bench/victim.py` on {settings['machine']}, {settings['processors']} processors, shared by the server "
        f"and all clients. Medians of {settings['rounds']} rounds of {settings['seconds']} s, in each of which the "
        "neighbour rests and then attacks over "
        f"{ATTACKERS} connections. The victim is the Flask app of the benchmark, asked {settings['rate']} times a second.",
        "",
        "| neighbour | p50 idle | p50 | p99 idle | p99 | ratio | worst | failed | cores busy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in data["attacks"].items():
        figures = medians(result)
        lines.append(
            f"| {result['what']} | {figures['idle p50']:.2f} | {figures['hostile p50']:.2f} | {figures['idle p99']:.2f} "
            f"| {figures['hostile p99']:.2f} | **{figures['ratio']:.2f}** | {figures['worst']:.1f} "
            f"| {figures['failures']} | {figures['cpu']:.2f} |"
        )
    lines += ["", "Times in ms. `cores busy` is the server's processor time per second while it is attacked.", ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    plot(data, path.with_suffix(".svg"))


def plot(data, path):
    plt = pyplot()
    if plt is None:
        return
    attacks = list(data["attacks"].values())[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(attacks) + 1.2), layout="constrained")
    for row, result in enumerate(attacks):
        for kind, colour, offset in (("idle", "#7fb3de", 0.18), ("hostile", "#c2702a", -0.18)):
            times = [one["p99"] for one in result["rounds"][kind]]
            axes.plot(times, [row + offset] * len(times), ".", color=colour, alpha=0.5, markersize=5)
            axes.plot([statistics.median(times)], [row + offset], "|", color=colour, markersize=11, markeredgewidth=2)
    axes.set_yticks(range(len(attacks)), [result["what"] for result in attacks])
    axes.set_xlabel("p99 of the victim in ms: neighbour idle (blue), hostile (brown); each round, and the median")
    axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="these attacks, separated by commas; the others' figures are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rate", type=float, default=200, help="requests of the victim in a second")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/wsgi-wasm")
    parser.add_argument("--name", default="victim")
    parser.add_argument("--report", action="store_true", help="only make the table and the plot again")
    args = parser.parse_args()
    end_when_told()
    path = HERE / "results" / args.name
    path.parent.mkdir(exist_ok=True)
    known = path.with_suffix(".json")
    data = json.loads(known.read_text()) if known.exists() else {"attacks": {}}
    if not args.report:
        apps = Apps(args.binary)
        data["settings"] = run_settings(
            rounds=args.rounds, seconds=args.seconds, rate=args.rate, connections=args.connections
        )
        for name in args.only.split(",") if args.only else ATTACKS:
            data["attacks"][name] = run(args, apps, name)
            figures = medians(data["attacks"][name])
            print(name, " ".join(f"{key} {value:.2f}" for key, value in figures.items()), flush=True)
            order = {name: data["attacks"][name] for name in ATTACKS if name in data["attacks"]}
            data["attacks"] = order
            write_json(known, data)
    report(data, path)


if __name__ == "__main__":
    main()
