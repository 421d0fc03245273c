"""Several processes of one training: how they are started, how they share work, and what is said when one ends."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import launched, launching
from pipeline.checkpoints import Checkpoint, Checkpoints
from pipeline.config import compose_config
from pipeline.errors import ConfigError, TrainingError
from pipeline.launched import LAUNCHER, MESSAGES
from pipeline.parents import Starters, this_process
from pipeline.ranks import Ranks
from pipeline.training import Trainer, micro_batch_rows


def one_of_two(monkeypatch: pytest.MonkeyPatch, folder: Path, launcher: str) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", MESSAGES: str(folder), LAUNCHER: launcher}.items():
        monkeypatch.setenv(name, value)


def test_its_launcher_is_known_by_its_number_even_where_that_is_1(monkeypatch, tmp_path) -> None:
    here = this_process()
    one_of_two(monkeypatch, tmp_path, f"{here.pid} {here.created}")
    assert Starters().death() is None
    one_of_two(monkeypatch, tmp_path, f"{here.pid} {here.created - 1000}")  # another process had that number
    assert Starters().death() == "the death of what launched it"


def test_another_number_of_processes_than_the_settings_say_is_refused(monkeypatch) -> None:
    launched.check_launch(compose_config([]).runtime)
    monkeypatch.setenv("WORLD_SIZE", "2")
    launched.check_launch(compose_config(["runtime=ddp"]).runtime)
    with pytest.raises(ConfigError, match=r"runtime\.num_processes: 1, but 2 processes were launched"):
        launched.check_launch(compose_config([]).runtime)


@pytest.mark.parametrize(
    ("exits", "messages", "said"),
    [
        ({0: 1, 1: -9}, {0: "another process does not answer"}, r"process 1 of 2 was ended by SIGKILL \(the system"),
        ({0: 1, 1: 1}, {0: "lora.r: too wide", 1: "lora.r: too wide"}, r"^lora\.r: too wide$"),
        ({0: 1, 1: -15}, {0: "the disk is full"}, "^the disk is full$"),
        ({0: 1}, {}, "process 0 of 2 failed with exit code 1"),
    ],
)
def test_what_ended_them_is_said_once(tmp_path, exits, messages, said) -> None:
    failures = {
        rank: SimpleNamespace(exitcode=code, signal_name=lambda code=code: {-9: "SIGKILL", -15: "SIGTERM"}[code])
        for rank, code in exits.items()
    }
    error = SimpleNamespace(failures=failures, get_first_failure=lambda: next(iter(failures.items())))
    for rank, text in messages.items():
        (tmp_path / str(rank)).write_text(text)
    with pytest.raises(TrainingError, match=said):
        raise TrainingError(launching._reason(error, tmp_path, 2))


def test_what_accelerate_is_told(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    overrides = ["runtime=fsdp", "runtime.num_processes=8", "runtime.num_machines=2", "runtime.machine_rank=1"]
    overrides += ["runtime.main_process_address=node0", "runtime.main_process_port=29500"]
    options = launching._options(compose_config(overrides).runtime, 4)
    assert {"--num_processes=8", "--num_machines=2", "--machine_rank=1", "--main_process_ip=node0"} <= set(options)
    assert {"--main_process_port=29500", "--num_cpu_threads_per_process=3"} <= set(options)


def test_own_settings_of_accelerate_are_not_taken(monkeypatch, tmp_path) -> None:
    """What `accelerate config` wrote for other work would end in its ValueError."""
    (tmp_path / "accelerate").mkdir()
    written = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\ngpu_ids: '0'\nmixed_precision: 'no'\n"
    (tmp_path / "accelerate/default_config.yaml").write_text(
        written + "num_processes: 1\nuse_cpu: false\ndebug: false\n"
    )
    program = (
        "import sys\n"
        "from pipeline.config import compose_config\n"
        "from pipeline.launching import launch\n"
        "launch(compose_config(['runtime=ddp']).runtime, 'tests.unit.rank_says', [])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0/2", "1/2"]


def test_micro_batches_are_shared_out(make_split) -> None:
    split = make_split([(3, 2)] * 9)
    assert [len(rows) for rows in micro_batch_rows(split, list(range(9)), 4, num_ranks=2)] == [4, 4, 1]
    assert [len(rows) for rows in micro_batch_rows(split, list(range(8)), 8, num_ranks=2)] == [4, 4]
    pieces = ["a", "b", "c"]
    assert list(Ranks(0, 2).share(pieces)) == [("a", True), ("c", True)]
    assert list(Ranks(1, 2).share(pieces)) == [("b", True), ("c", False)]  # as many forwards, and none counted twice
    assert list(Ranks(1, 2).share([])) == []


class Other(Ranks):
    """Process 1, whose main process chose step 4."""

    def from_main(self, value):
        return 4

    def gather(self, value):
        return [True, value]


def test_all_processes_go_on_from_the_checkpoint_that_process_0_chooses(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, every_steps=2, num_kept=3)
    for step in (2, 4, 6):
        checkpoints.save(Checkpoint(step, {}, {}, {"step": step}))
    trainer = SimpleNamespace(ranks=Other(1, 2))
    assert Trainer._newest(trainer, checkpoints).step == 4  # not the newest that it sees itself
    (tmp_path / "checkpoint-00000004/state.json").write_text("{}")
    with pytest.raises(TrainingError, match="process 1 does not see the checkpoint of step 4 whole"):
        Trainer._newest(trainer, checkpoints)
