"""The server under load: requests a second and times to an answer, batched and request by request.

Both servers run beside each other on the same reward model and are asked in turn, the second with a batch limit that
lets every request stand alone. Clients keep their connection and ask again as soon as they have an answer; requests are
of the demo's world, one prompt with four responses each.

    python -m benchmarks.serving --reward_model_dir DIR [--clients 1 8 64] [--requests 512] [--rounds 3]
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from helpsteer_rloo.data.demo import preference_rows

SERVERS = {"batched": "16384", "one by one": "1"}


def bodies(count: int) -> list[bytes]:
    """Requests: prompts of the demo's world, with the responses of two rows each."""
    rows = list(preference_rows(seed=7, rows=2 * count))
    return [
        json.dumps(
            {
                "messages": first["context"],
                "responses": [row[f"response{side}"] or "-" for row in (first, second) for side in (1, 2)],
            }
        ).encode()
        for first, second in zip(rows[::2], rows[1::2], strict=True)
    ]


@contextmanager
def server(directory: Path, batch_tokens: str):  # noqa: ANN201 - contextlib's type
    """A server in a process of its own; its port."""
    command = [sys.executable, "-m", "helpsteer_rloo.cli", "serve", f"--reward_model_dir={directory}", "--port=0"]
    process = subprocess.Popen(
        [*command, f"--batch_tokens={batch_tokens}"], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "Serving" in line)
        yield int(line.partition("127.0.0.1:")[2].partition(";")[0])
    finally:
        process.terminate()
        process.wait(60)


def load(port: int, requests: list[bytes], clients: int) -> dict[str, float]:
    """Ask all requests with so many clients; requests a second, and percentiles of seconds to an answer."""

    def client(number: int) -> list[float]:
        connection, seconds = http.client.HTTPConnection("127.0.0.1", port), []
        for body in requests[number::clients]:
            begin = time.perf_counter()
            connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {content[:200]!r}")
            seconds.append(time.perf_counter() - begin)
        return seconds

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = [one for own in pool.map(client, range(clients)) for one in own]
    took = time.perf_counter() - begin
    low, high = np.percentile(seconds, [50, 99])
    return {"a_second": len(seconds) / took, "p50": float(low), "p99": float(high)}


def main() -> None:
    """Run the loads and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model_dir", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    options = parser.parse_args()
    requests = bodies(options.requests)
    rows: list[dict[str, Any]] = []
    with (
        server(options.reward_model_dir, SERVERS["batched"]) as batched,
        server(options.reward_model_dir, SERVERS["one by one"]) as alone,
    ):
        ports = {"batched": batched, "one by one": alone}
        for port in ports.values():
            load(port, requests[:64], 4)  # warm
        for clients in options.clients:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
            for _ in range(options.rounds):
                for name, port in ports.items():
                    found[name].append(load(port, requests, clients))
            for name, rounds in found.items():
                row = {key: median(one[key] for one in rounds) for key in rounds[0]}
                rows.append({"name": f"serving/{name}, {clients} clients", "clients": clients, **row})
                times = f"p50 {1000 * row['p50']:.1f} ms, p99 {1000 * row['p99']:.1f} ms"
                print(f"{clients} clients, {name}: {row['a_second']:.1f} requests a second, {times}", flush=True)
            ratios = [a["a_second"] / b["a_second"] for a, b in zip(*found.values(), strict=True)]
            print(f"{clients} clients: {median(ratios):.2f} times as many ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
