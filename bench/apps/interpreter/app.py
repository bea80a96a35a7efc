"""Small computations in pure Python, timed from within: GET /NAME.

The answer is the best time of some repetitions, in seconds, and the result.
"""

import json
import re
import time


def calls():
    """Function calls: a naive Fibonacci number."""

    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    return fibonacci(28)


def objects():
    """Methods, attributes and small objects: a binary tree."""

    class Node:
        __slots__ = ("key", "left", "right")

        def __init__(self, key):
            self.key, self.left, self.right = key, None, None

        def insert(self, key):
            node = self
            while True:
                side = "left" if key < node.key else "right"
                below = getattr(node, side)
                if below is None:
                    setattr(node, side, Node(key))
                    return
                node = below

        def depth(self):
            below = [node.depth() for node in (self.left, self.right) if node is not None]
            return 1 + max(below, default=0)

    key, root = 1, Node(1 << 15)
    for _ in range(12000):
        key = (key * 1103515245 + 12345) % (1 << 31)
        root.insert(key >> 15)
    return root.depth()


def floats():
    """Floating point: bodies that attract each other."""
    bodies = [[float(n), n * 0.5, n * 0.25, 0.0, 0.1 * n, 0.0, 1.0 / (n + 1)] for n in range(5)]
    pairs = [(a, b) for i, a in enumerate(bodies) for b in bodies[i + 1 :]]
    for _ in range(8000):
        for a, b in pairs:
            x, y, z = a[0] - b[0], a[1] - b[1], a[2] - b[2]
            force = 0.001 / (x * x + y * y + z * z + 0.01) ** 1.5
            near, far = b[6] * force, a[6] * force
            a[3] -= x * near
            a[4] -= y * near
            a[5] -= z * near
            b[3] += x * far
            b[4] += y * far
            b[5] += z * far
        for body in bodies:
            body[0] += 0.001 * body[3]
            body[1] += 0.001 * body[4]
            body[2] += 0.001 * body[5]
    return round(bodies[0][0], 9)


def tables():
    """Dictionaries, lists and sorting."""
    words = [f"word{n * 7919 % 997}" for n in range(100000)]
    counts = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    groups = {}
    for word, count in counts.items():
        groups.setdefault(count, []).append(word)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return len(groups), ranked[0][0], sum(len(word) for word in set(words))


def strings():
    """Text: formatting, joining, splitting, replacing."""
    lines = [f"{n:05d};name {n};{n / 3:.3f};{'even' if n % 2 == 0 else 'odd'}" for n in range(25000)]
    total = 0.0
    out = []
    for line in "\n".join(lines).splitlines():
        number, name, value, kind = line.split(";")
        total += float(value)
        out.append(f"{name.upper().replace(' ', '_')}={int(number)}:{kind.title()}")
    return round(total, 3), len(",".join(out).encode())


def patterns():
    """Regular expressions."""
    text = "".join(f"user{n}@example.org, 2024-{n % 12 + 1:02d}-{n % 28 + 1:02d}; " for n in range(9000))
    mails = re.findall(r"\b[\w.]+@[\w.]+\.\w{2,}\b", text)
    dates = re.sub(r"(\d{4})-(\d{2})-(\d{2})", r"\3.\2.\1", text)
    return len(mails), len(dates), len(re.split(r"[;,]\s*", dates))


def documents():
    """JSON, there and back."""
    data = [{"id": n, "name": f"name {n}", "values": [n / 7, n * 2, None, True], "sub": {"k": "v" * 20}}
            for n in range(3500)]  # fmt: skip
    text = json.dumps(data)
    back = json.loads(text)
    return len(text), len(json.dumps(back, indent=1)), back == data


WORK = {work.__name__: work for work in (calls, objects, floats, tables, strings, patterns, documents)}
REPETITIONS = 5


def application(environ, start_response):
    name = environ["PATH_INFO"][1:]
    work = WORK.get(name)
    if work is None:
        answer = {"names": list(WORK)}
    else:
        times = []
        for _ in range(REPETITIONS):
            begin = time.perf_counter()
            result = work()
            times.append(time.perf_counter() - begin)
        answer = {"name": name, "seconds": min(times), "result": str(result)}
    body = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
