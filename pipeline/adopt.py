"""A sweep's point becomes the project's configuration, so that `dvc repro` takes its adapter from the store.

Writes conf/experiment/adopted.yaml (what the point sets), the default in conf/config.yaml that reads it, params.yaml.
Commands: python -m pipeline.adopt multirun/NAME 003 [--dry-run]
          python -m pipeline.adopt multirun/NAME --best | --smallest [--dry-run]
          python -m pipeline.adopt --undo [--dry-run]
"""

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline import store
from pipeline.adopted_config import ADOPTED, plan_adoption, plan_undo, short, write
from pipeline.config import PARAMS, check_params, clean_errors
from pipeline.errors import ConfigError, DataError
from pipeline.files import read_json
from pipeline.fingerprint import training_inputs
from pipeline.points import Point, State, Sweep
from pipeline.schema import RunConfig
from pipeline.stored_training import finished, identify
from pipeline.tracking_runs import flatten
from pipeline.workspace import Workspace


def find_point(sweep: Sweep, name: str) -> Point:
    """The finished point `3` or `003`.

    Raises:
        DataError: no such point, or not a finished one; the message lists the points with states and losses.
    """
    points = {point.folder.name: point for point in sweep.load_points()}
    listing = "Its points:\n" + "\n".join(f"  {describe(point)}" for point in points.values())
    point = points.get(name) or points.get(f"{int(name):03d}" if name.isdecimal() else "")
    if point is None:
        problem = f"no point {name}." if name else "give the point to adopt."
        raise DataError(f"{sweep.folder}: {problem} {listing}")
    if point.state is not State.finished:
        reason = f" ({point.reason})" if point.reason else ""
        raise DataError(
            f"{point.folder}: this point is {point.state}{reason}; only a finished one can be adopted. "
            f"Run the sweep again, or take another. {listing}"
        )
    return point


def chosen_point(sweep: Sweep, choice: str) -> str:
    """The name of the point that the comparison calls `best` or `smallest` (of its seeds the one it advises).

    Raises:
        DataError: there is no comparison, or points have finished since.
    """
    path = sweep.folder / "comparison" / "settings.json"
    again = f"Run `python -m pipeline.compare {sweep.folder}`, look at it, and adopt then."
    if not path.exists():
        raise DataError(f"{path}: no such file: the sweep's points were not compared yet. {again}")
    comparison = read_json(path)
    seen = {name for group in comparison["groups"] for each in group["settings"] for name in each["points"].values()}
    seen |= {each["point"] for each in comparison["not_compared"] if each["state"] == State.finished}
    done = {point.folder.name for point in sweep.load_points() if point.state is State.finished}
    if new := sorted(done - seen):
        raise DataError(f"{path}: made before {', '.join(new)} finished. {again}")
    return str(comparison[choice]["point"])


def losses(folder: Path) -> dict[str, float]:
    """Test and validation loss of a point's adapter (nats per supervised token), of what was measured."""
    found = {}
    if (path := folder / "metrics/evaluate.json").exists():
        found["test loss"] = read_json(path)["adapter"]["loss"]
    if (path := folder / "metrics/train.json").exists():
        found["validation loss"] = read_json(path)["validation_loss"]
    return found


def describe(point: Point) -> str:
    """A point in a line: its name, state, losses and overrides."""
    scores = [f"{name} {value:.4f}" for name, value in losses(point.folder).items()]
    return "  ".join([point.folder.name, point.state, *scores, *point.overrides])


def check_hand_edit() -> None:
    """Raises: ConfigError: params.yaml is neither what conf/ composes to nor what is committed: it would be lost."""
    if not PARAMS.exists():
        return
    committed = subprocess.run(["git", "show", f"HEAD:./{PARAMS}"], capture_output=True, check=False)
    if committed.returncode != 0 or committed.stdout != PARAMS.read_bytes():
        check_params()


def pending_stages() -> list[str]:
    """Which of prepare and quantize `dvc repro` has to run or fetch first.

    Raises:
        ConfigError: DVC cannot say.
    """
    command = [sys.executable, "-m", "dvc", "status", "--json", "prepare", "quantize"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"the point is adopted, but `dvc status` cannot say what comes next: {done.stderr.strip()}")
    return sorted(json.loads(done.stdout))


def reasons_to_train(config: RunConfig, fingerprint: str, inputs_made: bool) -> list[str]:
    """Why `dvc repro` would train again, a reason a line; empty: it takes the stored adapter.

    Args:
        fingerprint: of the training that is looked for.
        inputs_made: data/processed and models/quantized are those of these settings: their content is looked at too.
    """
    folder = store.entry(fingerprint)
    result = finished(folder) if folder.is_dir() else None
    if result is None:
        return [f"the store has no valid result .training/{fingerprint[:12]} (removed, or made on another machine)"]
    then = result["inputs"]
    now = identify(config, Workspace.here())[1] if inputs_made else training_inputs(config, then["base"], then["data"])
    old, new = dict(flatten(then)), dict(flatten(json.loads(json.dumps(now))))
    return [
        f"{key}: {old.get(key)} then, {new.get(key)} now" for key in sorted(old | new) if old.get(key) != new.get(key)
    ]


def foresee(config: RunConfig, fingerprint: str, pending: Sequence[str]) -> str:
    """What `dvc repro` will do about the adapter, for people."""
    if reasons := reasons_to_train(config, fingerprint, inputs_made=not pending):
        return "`dvc repro` will train it again:\n" + "\n".join(f"  {line}" for line in reasons)
    stored = f"its adapter is in the store (.training/{fingerprint[:12]})"
    if pending:
        return f"{stored}; `dvc repro` does {' and '.join(pending)} first, and takes it if their content is the sweep's"
    return f"{stored}: `dvc repro` takes it from there, evaluates and merges it, and does not train"


def run(options: argparse.Namespace) -> None:
    """Writes, or with `dry_run` only says what it would write."""
    point = None
    if options.undo:
        plan = plan_undo()
    else:
        sweep = Sweep.load(options.sweep)
        choice = "best" if options.best else "smallest" if options.smallest else None
        point = find_point(sweep, chosen_point(sweep, choice) if choice else options.point)
        plan = plan_adoption(point, _header(point))
    check_hand_edit()
    if options.dry_run:
        print("nothing is written (--dry-run)")
    else:
        write(plan)
    print(f"adopted: {describe(point)}" if point else "no point is adopted any more")
    print("\n".join(f"  {line}" for line in plan.changes) or "  every setting is so already")
    for path, text in plan.files.items():
        print(f"{'removed' if text is None else 'written'}: {short(path)}")
    if options.dry_run:
        print(plan.files[ADOPTED] or "", end="")
    elif point:
        print(foresee(plan.config, str(point.fingerprint), pending_stages()))
    print("next: `dvc repro`; then `git add` what it and this wrote (queued experiments see only what git knows)")


def _header(point: Point) -> list[str]:
    scores = [f"{name} {value:.6g} nats a token" for name, value in losses(point.folder).items()]
    return [
        f"Adopted from {point.folder} on {time.strftime('%Y-%m-%d %H:%M %z')}: {', '.join(scores) or 'not evaluated'}.",
        f"Fingerprint of the training: {point.fingerprint}",
        f"Alone: {point.command}",
        "Written by `python -m pipeline.adopt`, which replaces it whole; with --undo it removes it.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.adopt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, nargs="?", help="the sweep's folder, such as multirun/NAME")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "point", nargs="?", default="", help="its number, such as 003; without it, the points are listed"
    )
    which.add_argument("--best", action="store_true", help="the comparison's best point")
    which.add_argument("--smallest", action="store_true", help="the smallest that is indistinguishable from the best")
    which.add_argument("--undo", action="store_true", help="back to the configuration without an adopted point")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")
    options = parser.parse_args(arguments)
    if (options.sweep is None) is not options.undo:
        parser.error("give a sweep's folder, or --undo alone")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with clean_errors("adopt"):
        run(options)


if __name__ == "__main__":
    main()
