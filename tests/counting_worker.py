"""Stands in for pipeline.point_worker: counts to a number, leaves a checkpoint when it is told to stop, goes on from it.

python tests/counting_worker.py FOLDER NUMBER
"""

import os
import signal
import sys
import time
from pathlib import Path

STEP_SECONDS = 0.05


def main(folder: Path, number: int) -> int:
    checkpoint = folder / "checkpoint"
    count = int(checkpoint.read_text()) if checkpoint.exists() else 0
    signals: list[int] = []
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, lambda received, frame: signals.append(received))
    print(f"starts at {count}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    (folder / "started").write_text(str(os.getpid()))
    while count < number:
        time.sleep(STEP_SECONDS)
        count += 1
        if signals:
            time.sleep(0.5)  # as a checkpoint takes its time; a second signal in it loses it, as in a training
            if len(signals) == 1:
                checkpoint.write_text(str(count))
            return 130
    print(f"counted to {count}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
