"""Who waits for whom, in words, and when unreadable images stop a run."""

import numpy as np
import pytest

from proteus_jax.engine.monitors import CorruptImageMonitor, InputBoundWarning
from proteus_jax.errors import InputError


def test_a_slow_input_is_said_once() -> None:
    said: list[str] = []
    notice = InputBoundWarning("14 worker processes", 10, said.append)
    notice.lap(5, 0.9, 100.0)
    notice.lap(10, 0.05, 100.0)
    assert said == []
    for step in (15, 20):
        notice.lap(step, 0.43, 5120.4)
    assert said == [
        "the device waits 43% of the time: this host makes 5120 images a second with 14 worker "
        "processes; docs/data.md says what helps"
    ]


def views_until_stopped(broken: float, limit: float, repeats: int, seed: int) -> int | None:
    """Views seen when the run stops; None where it never does."""
    rng = np.random.default_rng(seed)
    account = CorruptImageMonitor(str, limit=limit, repeats=repeats, say=lambda _: None)
    for step in range(400):
        failed = np.repeat(rng.random(48 // repeats) < broken, repeats)
        try:
            account.note(np.where(failed, np.arange(48), -1))
        except InputError:
            return 48 * (step + 1)
    return None


@pytest.mark.parametrize("repeats", [1, 3])
def test_too_many_unreadable_images_stop_a_run_and_few_do_not(repeats: int) -> None:
    assert views_until_stopped(0.0, 0.0, repeats, 0) is None
    assert all(views_until_stopped(0.04, 0.1, repeats, seed) is None for seed in range(20))
    for broken in (0.2, 0.5, 1.0):
        for seed in range(5):
            stopped = views_until_stopped(broken, 0.1, repeats, seed)
            assert stopped is not None
            assert stopped <= 6000


def test_each_unreadable_image_is_named_once_and_not_for_ever() -> None:
    said: list[str] = []
    account = CorruptImageMonitor(str, limit=1.0, repeats=1, say=said.append)
    for _ in range(2):
        account.note(np.array([3, -1, 5, 3]))
    assert said == [f"{n} cannot be read; another image takes its place" for n in (3, 5)]
    account.note(np.arange(100))
    assert len(said) == 20
    assert len(account.met) == 100
