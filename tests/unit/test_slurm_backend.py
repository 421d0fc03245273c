"""Jobs through submitit: real processes on this machine, and, with stand-ins for Slurm's commands, what sbatch gets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest

from pipeline import remote_worker, slurm_backend
from pipeline.errors import ConfigError
from pipeline.jobs import Job
from pipeline.remote_worker import RemoteWorker, new_marker
from pipeline.slurm_backend import SlurmBackend, SlurmError
from tests.conftest import ROOT

COUNTER = [sys.executable, str(ROOT / "tests/counting_worker.py")]
HEAD = """
import sys
from pathlib import Path
from pipeline.jobs import Job
from pipeline.slurm_backend import SlurmBackend
sweep = Path(sys.argv[1])
jobs = [Job(i, (folder,)) for i, folder in enumerate(sorted(sweep.glob("0*")))]
command = lambda job: [sys.executable, "tests/counting_worker.py", str(job.folders[0]), "1000"]
try:
    SlurmBackend(cluster="local", gpus_per_node=0, num_workers=2).run(jobs, lambda job, end: print(job, end), command)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Three jobs of a sweep; the backend looks often."""
    monkeypatch.setattr(slurm_backend, "POLL_SECONDS", 0.1)
    folders = [tmp_path / f"sweep/00{i}" for i in range(3)]
    for folder in folders:
        folder.mkdir(parents=True)
    return [Job(i, (folder,)) for i, folder in enumerate(folders)]


def run(backend: SlurmBackend, jobs: list[Job], *commands: list[str]) -> dict[int, str | None]:
    """What on_end was told, by job, in the order of the ends."""
    ends: dict[int, str | None] = {}
    backend.run(jobs, lambda job, end: ends.update({job.number: end}), lambda job: commands[job.number])
    return ends


def log(job: Job) -> str:
    return (job.folders[0] / "worker.log").read_text()


def wait_for(path: Path, seconds: float = 30) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return path.read_text()


def on_this_machine(**settings) -> SlurmBackend:
    return SlurmBackend(**({"cluster": "local", "gpus_per_node": 0, "num_workers": 3} | settings))


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_one_job_fails_and_the_others_do_not(jobs, cluster):
    ends = run(
        on_this_machine(cluster=cluster), jobs,
        [*COUNTER, str(jobs[0].folders[0]), "3"], ["sh", "-c", "echo no luck; exit 5"], ["sh", "-c", "kill -9 $$"],
    )  # fmt: skip
    assert ends[0] is None
    assert ends[1] == f"its process ended with exit status 5; {jobs[1].folders[0]}/worker.log ends in: no luck"
    assert "signal 9" in ends[2]
    assert "starts at 0, CUDA_VISIBLE_DEVICES=\ncounted to 3" in log(jobs[0])
    assert not list(jobs[0].folders[0].parent.glob(".shared-*"))


def test_no_more_jobs_at_once_than_asked_for(jobs):
    overlap = "mkdir ../busy || exit 1; sleep 1; rmdir ../busy".replace("..", str(jobs[0].folders[0].parent))
    assert run(on_this_machine(num_workers=1), jobs[:2], *[["sh", "-c", overlap]] * 2) == {0: None, 1: None}
    assert any(run(on_this_machine(num_workers=2), jobs[:2], *[["sh", "-c", overlap]] * 2).values())  # it would show


def test_a_stopped_sweep_leaves_checkpoints_and_goes_on(jobs):
    """SIGTERM to the head: what runs writes its checkpoint, what waits never starts, and the next sweep takes it up."""
    sweep = jobs[0].folders[0].parent
    head = subprocess.Popen([sys.executable, "-c", HEAD, str(sweep)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for job in jobs[:2]:
        wait_for(job.folders[0] / "started")
    head.send_signal(signal.SIGTERM)
    assert head.communicate(timeout=60)[0] == "interrupted\n"
    counts = [int((job.folders[0] / "checkpoint").read_text()) for job in jobs[:2]]
    assert min(counts) > 0
    assert not (jobs[2].folders[0] / "started").exists()
    assert not list(sweep.glob(".shared-*"))

    goals = [[*COUNTER, str(job.folders[0]), str(max(counts) + 2)] for job in jobs]
    assert run(on_this_machine(), jobs, *goals) == {0: None, 1: None, 2: None}
    assert f"starts at {counts[0]}," in log(jobs[0])


def test_a_job_that_runs_out_of_time_is_requeued_from_its_checkpoint(jobs):
    """Slurm's SIGUSR2 to submitit's process, and, as some of its set-ups do, to every process of the job."""
    folder = jobs[0].folders[0]

    def command(job: Job) -> list[str]:
        return [*COUNTER, str(folder), "60"]

    ends: list[str | None] = []
    ready = subprocess.Popen([sys.executable, "-c", SIGNAL_ONCE, str(folder / "started")])
    on_this_machine().run(jobs[:1], lambda job, end: ends.append(end), command)
    assert ready.wait(30) == 0
    assert ends == [None]
    assert log(jobs[0]).count("starts at") == 2
    assert f"starts at {(folder / 'checkpoint').read_text()}," in log(jobs[0])
    assert "starts at 0," in log(jobs[0])


SIGNAL_ONCE = """
import os, pathlib, signal, sys, time
import psutil
started = pathlib.Path(sys.argv[1])
while not started.exists() or not started.read_text():
    time.sleep(0.05)
time.sleep(0.3)
worker = psutil.Process(int(started.read_text()))
for process in (worker, worker.parent()):
    process.send_signal(signal.SIGUSR2)
"""


def test_a_job_that_runs_out_of_time_too_often_fails(jobs):
    folder = jobs[0].folders[0]
    with subprocess.Popen([sys.executable, "-c", SIGNAL_ONCE, str(folder / "started")]):
        ends = run(on_this_machine(timeout_min=5, max_num_timeout=0), jobs[:1], [*COUNTER, str(folder), "1000"])
    assert "timed-out too many times" in ends[0]
    assert "Traceback" not in ends[0]


@pytest.fixture
def worker(tmp_path: Path) -> RemoteWorker:
    (tmp_path / "000").mkdir()
    command = [*COUNTER, str(tmp_path / "000"), "2"]
    return RemoteWorker(command, ROOT, tmp_path / "000/worker.log", new_marker(tmp_path), {}, 5.0, requeued=True)


def test_a_preempted_job_does_not_end_before_slurm_requeues_it(worker, tmp_path):
    """SIGTERM to every process: one checkpoint, and then it stays until it is killed, or the sweep is over."""
    worker.command[-1] = "1000"
    cloudpickle.register_pickle_by_value(remote_worker)
    (tmp_path / "worker.pkl").write_bytes(cloudpickle.dumps(worker))
    code = f"import pickle, pathlib; print(pickle.loads(pathlib.Path({str(tmp_path / 'worker.pkl')!r}).read_bytes())())"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(wait_for(tmp_path / "000/started"))
    for target in (pid, process.pid, pid):
        os.kill(target, signal.SIGTERM)
    wait_for(tmp_path / "000/checkpoint")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    worker.marker.unlink()
    assert process.communicate(timeout=10)[0] == "130\n"


def test_a_killed_owner_takes_its_job_with_it(worker, tmp_path):
    worker.command[-1] = "1000"
    cloudpickle.register_pickle_by_value(remote_worker)
    (tmp_path / "worker.pkl").write_bytes(cloudpickle.dumps(worker))
    code = f"import pickle, pathlib; pickle.loads(pathlib.Path({str(tmp_path / 'worker.pkl')!r}).read_bytes())()"
    owner = subprocess.Popen([sys.executable, "-c", code])
    counter = psutil.Process(int(wait_for(tmp_path / "000/started")))
    owner.kill()
    owner.wait()
    counter.wait(5)


def test_what_a_machine_lacks_is_said_without_the_project(worker, tmp_path, monkeypatch):
    """The worker is unpickled in a process that cannot import `pipeline`, as where the project is not."""
    monkeypatch.setattr(remote_worker, "MARKER_SECONDS", 0.5)
    cloudpickle.register_pickle_by_value(remote_worker)
    code = "import pickle, sys; sys.modules['pipeline'] = None; print(pickle.load(sys.stdin.buffer)())"

    def call() -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, input=cloudpickle.dumps(worker), capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    assert call() == "0\n"
    worker.command[0] = "/no/python"
    assert "/no/python" in call()
    worker.marker.unlink()
    assert f"{worker.marker}: " in call()
    assert "network file system" in call()
    worker.root = Path("/no/project")
    assert call().startswith("/no/project: ")


SBATCH = """#!/bin/sh
cp "$1" "$FAKE/batch"
echo Submitted batch job 77
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of stand-ins for sbatch, srun, squeue and scancel, which run nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "sbatch": SBATCH, "srun": "#!/bin/sh\n", "squeue": '#!/bin/sh\ncat "$FAKE/queue"\n',
        "scancel": '#!/bin/sh\necho "$@" > "$FAKE/cancelled"; : > "$FAKE/queue"\n',
    }.items():  # fmt: skip
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_backend, "QUEUE_SECONDS", 0.2)
    return folder


def test_sbatch_gets_an_array_with_the_settings(jobs, slurm):
    """Nothing runs the array here: jobs that are not in the queue and have no result are lost."""
    backend = SlurmBackend(
        partition="gpu", account="lab", qos="high", timeout_min=90, gpus_per_node=1, cpus_per_task=6, mem_gb=24,
        num_workers=2, signal_delay_s=120, setup=["module load cuda"], additional_parameters={"reservation": "night"},
    )  # fmt: skip
    ends = run(backend, jobs, *[["true"]] * 3)
    assert sorted(ends) == [0, 1, 2]
    assert "job 77_1 ended with no result" in ends[1]
    batch = (slurm / "batch").read_text().splitlines()
    for line in (
        "--partition=gpu", "--account=lab", "--qos=high", "--time=90", "--gpus-per-node=1", "--cpus-per-task=6",
        "--mem=24GB", "--array=0-2%2", "--signal=USR2@120", "--reservation=night", "--job-name=sweep-sweep",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in batch
    assert "module load cuda" in batch
    srun = next(line for line in batch if line.startswith("srun"))
    assert "--cpus-per-task=6" in srun
    assert sys.executable in srun


def test_without_gpus_none_is_asked_for(jobs, slurm):
    run(SlurmBackend(gpus_per_node=0), jobs, *[["true"]] * 3)
    assert "--gpus" not in (slurm / "batch").read_text()


def test_jobs_in_the_queue_are_waited_for_and_cancelled_with_the_sweep(jobs, slurm):
    (slurm / "queue").write_text("77_0\n77_1\n77_2\n")
    told: list[int] = []
    signal.signal(signal.SIGALRM, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    with pytest.raises(KeyboardInterrupt):
        SlurmBackend().run(jobs, lambda job, end: told.append(job.number), lambda job: ["true"])
    assert told == []
    assert (slurm / "cancelled").read_text() == "77_0 77_1 77_2\n"


def test_what_sbatch_refuses_is_said(jobs, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'error: invalid partition specified: gpuu' >&2; exit 1\n")
    with pytest.raises(SlurmError, match="invalid partition specified: gpuu"):
        run(SlurmBackend(partition="gpuu"), jobs, *[["true"]] * 3)


def test_no_slurm_is_no_quiet_local_run(jobs, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"srun is not on the PATH.*cluster=local"):
        run(SlurmBackend(), jobs, *[["true"]] * 3)


def test_no_submitit_is_said(jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SlurmError, match=r"pip install -c constraints.txt -e '.\[slurm\]'"):
        run(SlurmBackend(), jobs, *[["true"]] * 3)


def test_settings_that_cannot_be_are_said_together():
    with pytest.raises(ConfigError, match=r"num_workers=0 .*mem_gb=0 .*signal_delay_s=90 .*cluster='pbs'"):
        SlurmBackend(num_workers=0, mem_gb=0, timeout_min=1, cluster="pbs")
