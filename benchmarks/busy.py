"""
What the demo's training step costs on a quiet and on a busy machine, by number of threads and how they wait for each
other. Each setting runs in its own process. In each round all take turns, without and with a loop that keeps one core
busy.

    python benchmarks/busy.py [--rounds 8] [--output_dir benchmarks/results]

Run it when nothing else runs: the load average is part of the report.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from ratios import make_parser, median_and_range, quotients, setting, write

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# GOMP_SPINCOUNT: how often a thread looks for the others before it sleeps.
SETTINGS = {
    "two threads, GOMP_SPINCOUNT=300000 (default)": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},
    "two threads, GOMP_SPINCOUNT=1000 (the demo)": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "two threads, GOMP_SPINCOUNT=300": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300"},
    "two threads, GOMP_SPINCOUNT=0 (passive)": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BATCH_SIZE = 64
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with this process


def work() -> None:
    """Reads numbers of steps from stdin, trains that long, and answers with the seconds of a step."""
    import torch
    from common import build_model, load_split, train_tokenizer

    from transfusion_hf import TransfusionDataCollator

    torch.manual_seed(0)
    model, processor = build_model(train_tokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    collate, (samples, _) = TransfusionDataCollator(processor), load_split()
    first = 0
    for line in sys.stdin:
        start, num_steps = time.perf_counter(), int(line)
        for _ in range(num_steps):
            batch = collate([samples[(first + i) % len(samples)] for i in range(BATCH_SIZE)])
            first += BATCH_SIZE
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print((time.perf_counter() - start) / num_steps, flush=True)


def ask(worker: subprocess.Popen, num_steps: int) -> float:
    worker.stdin.write(f"{num_steps}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    parser = make_parser(__doc__, rounds=8)
    parser.add_argument("--steps", type=int, default=5, help="training steps of a turn")
    args = parser.parse_args()
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # the scheduler divides the machine among sessions
        )
        for name, environment in SETTINGS.items()
    }
    for worker in workers.values():
        ask(worker, 3)
    loads = [os.getloadavg()[0]]
    seconds: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in workers for busy in (False, True)}
    for _ in range(args.rounds):
        for busy in (False, True):
            for name, worker in workers.items():
                loop = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) if busy else None
                seconds[name, busy].append(ask(worker, args.steps))
                if loop is not None:
                    loop.kill()
                    loop.wait()
    loads.append(os.getloadavg()[0])
    for worker in workers.values():
        worker.stdin.close()

    base = seconds[next(iter(workers)), False]
    lines = [
        "| setting | one core busy | step / the first, median | min–max | median ms |",
        "|---|---|---|---|---|",
    ]
    for (name, busy), own in seconds.items():
        milliseconds = 1e3 * sorted(own)[len(own) // 2]
        busy_word = "yes" if busy else "no"
        lines.append(f"| {name} | {busy_word} | {median_and_range(quotients(own, base), 2)} | {milliseconds:.0f} |")
    text = (
        f"# The demo on a busy machine\n\n{setting(args.device)}, load average {loads[0]:.1f} at the start and "
        f"{loads[1]:.1f} at the end, `python benchmarks/busy.py`: steps of the quickstart's training, batches of "
        f"{BATCH_SIZE}, {args.rounds} rounds of {args.steps} steps.\n\n" + "\n".join(lines) + "\n"
    )
    write(text, "busy", args)


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
