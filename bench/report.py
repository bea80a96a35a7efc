"""Makes the tables and the plots of a run: `report.py RESULTS.json`."""

import json
import statistics
import sys
from pathlib import Path

from contestants import (
    GRANIAN, GUNICORN, PEERS, WASMTIME, WASMTIME_FRESH, WORKLOADS, WSGI_WASM, WSGI_WASM_FRESH,
)  # fmt: skip
from measure import pyplot

plt = pyplot(**{"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False})
if plt is None:
    sys.exit(1)

COLOURS = {
    "wsgi-wasm": "#1f6fb4", "wsgi-wasm-fresh": "#7fb3de", "granian": "#444444", "waitress": "#777777",
    "gunicorn-gthread": "#a0a0a0", "gunicorn-sync": "#c8c8c8", "wasmtime-reuse": "#c2702a",
    "wasmtime-fresh": "#e8b98d",
}  # fmt: skip
TITLES = {peer.name: peer.title for peer in PEERS}
# Starts of these are reported: of no framework, a small and a large one.
COLD = {"hello": "no framework", "flask": "Flask", "django": "Django"}
GIGABYTE = 1e9


class Results:
    """A run's figures."""

    def __init__(self, path):
        self.path = path
        self.data = json.loads(path.read_text())
        self.units = self.data["units"]

    def median(self, unit, peer, figure):
        """The median of all rounds; none if there is none."""
        rounds = self.units.get(unit, {}).get("rounds of", {}).get(peer.name)
        return statistics.median(one[figure] for one in rounds) if rounds else None

    def spread(self, unit, peer, figure):
        """How far the rounds were apart, as a part of their median."""
        values = [one[figure] for one in self.units[unit]["rounds of"][peer.name]]
        return (max(values) - min(values)) / statistics.median(values)

    def ratio(self, unit, ours, theirs, figure="rate"):
        """How many times as much."""
        a, b = self.median(unit, ours, figure), self.median(unit, theirs, figure)
        return a / b if a and b else None

    def interpreter(self, peer):
        """Speed of each computation relative to native CPython, and their geometric mean."""
        unit = self.units.get("interpreter", {}).get("rounds of", {})
        if peer.name not in unit or GUNICORN.name not in unit:
            return {}, None
        speeds = {
            name: self.median("interpreter", GUNICORN, name) / self.median("interpreter", peer, name)
            for name in unit[peer.name][0]
        }
        return speeds, statistics.geometric_mean(speeds.values())

    def tenants_per_gigabyte(self, peer):
        """As many as fit, by the memory of the first and of each further one."""
        base, further = (self.median("tenants", peer, figure) for figure in ("base", "further"))
        return None if further is None else int((GIGABYTE - base) / further)

    def marks(self):
        """What we want to reach: words, measured ratio, wanted ratio."""
        ours, fresh = WSGI_WASM, WSGI_WASM_FRESH
        return [
            ("hello: reuse to gunicorn sync", self.ratio("hello", ours, GUNICORN), 5),
            ("hello: reuse to Granian", self.ratio("hello", ours, GRANIAN), 1),
            ("Flask: reuse to gunicorn sync", self.ratio("flask", ours, GUNICORN), 2),
            ("Flask: reuse to Granian", self.ratio("flask", ours, GRANIAN), 1),
            ("hello: fresh to gunicorn sync, which reuses", self.ratio("hello", fresh, GUNICORN), 1),
            ("hello: fresh to `wasmtime serve` fresh", self.ratio("hello", fresh, WASMTIME_FRESH), 10),
            ("hello: reuse to `wasmtime serve` reuse", self.ratio("hello", ours, WASMTIME), 2),
            ("Flask: fresh to `wasmtime serve` fresh", self.ratio("flask", fresh, WASMTIME_FRESH), 10),
            ("Flask: reuse to `wasmtime serve` reuse", self.ratio("flask", ours, WASMTIME), 2),
            ("interpreter: wsgi-wasm to native CPython", self.interpreter(ours)[1], 0.6),
        ]


def number(value, digits=3):
    """A figure with as many digits as it deserves."""
    if value is None:
        return "–"
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value >= 1 else f"{value:.2f}"


def table(head, rows):
    """A markdown table; the first column is text, the others are figures."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def markdown(results):
    """The page with all tables."""
    data, name = results.data, results.path.stem
    machine = data["machine"]
    some = next(iter(results.units.values()))
    lines = [
        "# Results", "",
        "Made by `bench/bench.py`; [what the columns mean](../README.md).", "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory']}, {machine['system']}.",
        f"Servers on core {', '.join(map(str, some['server cores']))}, wrk on core "
        f"{', '.join(map(str, some['load cores']))}. Medians of {some['rounds']} rounds of {some['seconds']} s, "
        "the servers taking turns.", "",
        "Versions: " + ", ".join(f"{what} {version}" for what, version in data["versions"].items()) + ".", "",
    ]  # fmt: skip
    lines += table(["server", "set up"], [[f"**{peer.title}**", peer.setting] for peer in PEERS])
    lines[-len(PEERS) - 2] = "| --- | --- |"

    lines += ["## Marks", ""]
    rows = []
    for words, ratio, wanted in results.marks():
        verdict = "not measured" if ratio is None else "met" if ratio >= wanted else "**missed**"
        rows.append([words, number(ratio), f"at least {wanted}", verdict])
    lines += table(["requests per second, or speed", "ratio", "wanted", ""], rows)

    lines += ["## Requests", "", f"![Requests per second]({name}-requests.svg)", ""]
    lines += [f"![Latency]({name}-latency.svg)", ""]
    for workload in WORKLOADS:
        unit = results.units.get(workload.name)
        if not unit:
            continue
        plural = "s" if unit["connections"] > 1 else ""
        longer = f", rounds of {unit['seconds']} s" if unit["seconds"] != some["seconds"] else ""
        lines += [f"### {workload.title}", "", f"{unit['connections']} connection{plural}, "
                  f"answers of {unit['bytes']:,} bytes{longer}.", ""]  # fmt: skip
        rows = []
        for peer in PEERS:
            if peer.name not in unit["rounds of"]:
                continue
            figures = [results.median(workload.name, peer, figure) for figure in ("rate", "p50", "p90", "p99")]
            cpu, memory = (results.median(workload.name, peer, figure) for figure in ("cpu", "memory"))
            rows.append([peer.title, *map(number, figures), number(cpu), number(memory / 1e6),
                         f"{results.spread(workload.name, peer, 'rate'):.0%}"])  # fmt: skip
        lines += table(["server", "requests/s", "p50 ms", "p90 ms", "p99 ms", "CPU µs", "MB", "spread"], rows)
        lines += failures(unit)
        broken = {
            peer.title: sum(one["broken"] for one in unit["rounds of"].get(peer.name, ())) for peer in PEERS
        }
        lines += [f"{title}: {count} connections broke or timed out.\n" for title, count in broken.items() if count]

    cold = [name for name in COLD if name in results.units]
    if cold:
        lines += ["## Cold start", "", "From the start of the process to the first answer, in ms.", ""]
        rows = [
            [peer.title, *(number(results.median(name, peer, "start")) for name in cold)] for peer in PEERS
        ]
        lines += table(["server", *(COLD[name] for name in cold)], rows)

    if "tenants" in results.units:
        unit = results.units["tenants"]
        lines += ["## Tenants", "", "Each has its own copy of the Flask app and has served requests.", "",
                  f"![Tenants in a gigabyte]({name}-tenants.svg)", ""]  # fmt: skip
        rows = []
        for peer in PEERS:
            if peer.name in unit["rounds of"]:
                measured, base, further = (
                    results.median("tenants", peer, figure) for figure in ("tenants", "base", "further")
                )
                rows.append([peer.title, number(measured), number(base / 1e6), number(further / 1e6),
                             number(results.tenants_per_gigabyte(peer), 9)])  # fmt: skip
        lines += table(["server", "measured with", "MB at first", "MB per tenant", "tenants per GB"], rows)
        lines += failures(unit)
        if WSGI_WASM.name in unit["rounds of"]:
            count, load, restart = (
                results.median("tenants", WSGI_WASM, figure) for figure in ("tenants", "load", "restart")
            )
            lines += [f"wsgi-wasm, one core: a new tenant is loaded in {number(load)} ms. With {number(count)} "
                      f"tenants in the cache, a start takes {number(restart)} ms.", ""]  # fmt: skip

    if "interpreter" in results.units:
        unit = results.units["interpreter"]
        lines += ["## Interpreter", "", "Time of pure Python in ms, and speed relative to native CPython.", "",
                  f"![Speed of the interpreter]({name}-interpreter.svg)", ""]  # fmt: skip
        others = [peer for peer in (WSGI_WASM, WASMTIME) if peer.name in unit["rounds of"]]
        rows = []
        for work in next(iter(unit["rounds of"].values()))[0]:
            row = [work, number(results.median("interpreter", GUNICORN, work))]
            for peer in others:
                speed = results.interpreter(peer)[0].get(work)
                row += [number(results.median("interpreter", peer, work)), number(speed)]
            rows.append(row)
        means = [text for peer in others for text in ("", f"**{number(results.interpreter(peer)[1])}**")]
        rows.append(["geometric mean", "", *means])
        head = [text for peer in others for text in (peer.title, "speed")]
        lines += table(["", "native", *head], rows)
        lines += failures(unit)
    return "\n".join(lines).rstrip() + "\n"


def failures(unit):
    """Why servers are missing in a table."""
    lines = []
    for name, reason in unit["failures"].items():
        first, *rest = reason.splitlines()
        lines += [f"{TITLES[name]}: {first}", ""]
        if rest:
            lines += ["```", *rest, "```", ""]
    return lines


def save(figure, results, name):
    """Writes a plot beside the results."""
    path = results.path.with_name(f"{results.path.stem}-{name}.svg")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def bars(axes, title, values, form=number):
    """Horizontal bars, the first on top, with their values."""
    names = list(values)
    axes.barh(range(len(names)), [values[name] or 0 for name in names], color=[COLOURS[name] for name in names])
    axes.set_yticks(range(len(names)), [TITLES[name] for name in names])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    for position, name in enumerate(names):
        axes.annotate(form(values[name]), (values[name] or 0, position), xytext=(3, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.margins(x=0.2)


def plots(results):
    """All plots of what was measured."""
    loads = [workload for workload in WORKLOADS if workload.name in results.units]
    if loads:
        rows = -(-len(loads) // 3)
        figure, grid = plt.subplots(rows, 3, figsize=(11, 1.9 * rows), squeeze=False, sharey=True)
        for axes in grid.flat[len(loads) :]:
            axes.set_visible(False)
        for axes, workload in zip(grid.flat, loads, strict=False):
            values = {peer.name: results.median(workload.name, peer, "rate") for peer in PEERS}
            # With a shared axis, only the first turns it around.
            bars(axes, workload.title, values)
        if not grid.flat[0].yaxis_inverted():
            grid.flat[0].invert_yaxis()
        figure.suptitle("Requests per second, one core", x=0.02, ha="left")
        figure.tight_layout()
        save(figure, results, "requests")

        figure, grid = plt.subplots(rows, 3, figsize=(11, 1.9 * rows), squeeze=False, sharey=True)
        for axes in grid.flat[len(loads) :]:
            axes.set_visible(False)
        for axes, workload in zip(grid.flat, loads, strict=False):
            for position, peer in enumerate(PEERS):
                low, high = (results.median(workload.name, peer, figure_) for figure_ in ("p50", "p99"))
                if low is not None:
                    axes.plot([low, high], [position, position], color=COLOURS[peer.name], linewidth=2)
                    axes.plot([low], [position], "o", color=COLOURS[peer.name], markersize=4)
            axes.set_xscale("log")
            axes.set_yticks(range(len(PEERS)), [peer.title for peer in PEERS])
            axes.set_title(workload.title, fontsize=9, loc="left")
        grid.flat[0].set_ylim(len(PEERS) - 0.5, -0.5)
        figure.suptitle("Latency in ms: the median (dot) to the 99th percentile", x=0.02, ha="left")
        figure.tight_layout()
        save(figure, results, "latency")
    tenants = {peer.name: results.tenants_per_gigabyte(peer) for peer in PEERS}
    tenants = {name: value for name, value in tenants.items() if value is not None}
    if tenants:
        figure, axes = plt.subplots(figsize=(6, 1.6))
        bars(axes, "Flask tenants in a gigabyte, each with a process or an instance that has served", tenants)
        save(figure, results, "tenants")
    speeds = {peer.name: results.interpreter(peer)[0] for peer in (WSGI_WASM, WASMTIME)}
    speeds = {name: values for name, values in speeds.items() if values}
    if speeds:
        figure, axes = plt.subplots(figsize=(7, 2.4))
        for offset, (name, values) in enumerate(speeds.items()):
            width = 0.8 / len(speeds)
            places = [position + offset * width for position in range(len(values))]
            axes.bar(places, values.values(), width, color=COLOURS[name], label=TITLES[name])
        names = next(iter(speeds.values()))
        axes.set_xticks([position + 0.4 - width / 2 for position in range(len(names))], names)
        axes.axhline(1, color="#444444", linewidth=1)
        axes.annotate("native CPython", (0, 1), xytext=(0, 3), textcoords="offset points", fontsize=8)
        axes.set_title("Speed of pure Python relative to native CPython", fontsize=9, loc="left", pad=12)
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 1.25), ncols=2)
        save(figure, results, "interpreter")


def main():
    results = Results(Path(sys.argv[1]))
    results.path.with_suffix(".md").write_text(markdown(results))
    plots(results)
    for words, ratio, wanted in results.marks():
        if ratio is not None:
            print(f"{'met   ' if ratio >= wanted else 'missed'}  {words}: {ratio:.2f}, wanted {wanted}")
    print(f"the tables are in {results.path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
