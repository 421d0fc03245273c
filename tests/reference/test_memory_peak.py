"""The planned peak against what real trainings take (`benchmarks.memory`), each in a process of its own."""

import pytest

from benchmarks.memory import SMALL, WORKS, compare
from pipeline.schema import Device

LIMIT = 0.15  # of what is measured
CPU = [name for name, work in WORKS.items() if work.device is Device.cpu]


@pytest.mark.parametrize("name", SMALL)
def test_the_peak_of_a_small_training(name: str) -> None:
    result = compare(name)
    assert result["planned"] == pytest.approx(result["measured"], rel=LIMIT)
    # control: without what comes and goes the plan would be wrong
    parts = result["parts"]
    kept = parts["weights"] + parts["adapter"] + parts["gradients"] + parts["optimizer"]
    assert kept < (1 - LIMIT) * result["measured"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", CPU)
def test_the_peak_on_a_cpu(name: str) -> None:
    result = compare(name)
    assert result["measured"] >= 2**30
    assert result["planned"] == pytest.approx(result["measured"], rel=LIMIT)


def test_there_are_enough_configurations() -> None:
    assert len(CPU) >= 12
    methods = {(work.method, work.keeps, work.stored, work.checkpointing) for work in (WORKS[name] for name in CPU)}
    assert len(methods) >= 7
