"""The order of the data, its batches, and the processes that make them."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, photograph

from proteus_jax.data import decode, sampler
from proteus_jax.data.dataset import open_images
from proteus_jax.data.loader import HostBatch, held_out_views, training_batches
from proteus_jax.data.sampler import Sampler, shares
from proteus_jax.data.sources.base import MemorySource, Source
from proteus_jax.data.splits import HeldOut
from proteus_jax.data.transforms.randaugment import RandAugment
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.errors import InputError, Unreadable


@pytest.fixture
def source(rng: np.random.Generator) -> MemorySource:
    return MemorySource([photograph(rng) for _ in range(10)], [str(i) for i in range(10)])


def batches(source: Source, steps: range, **changes) -> list[HostBatch]:
    chosen = Sampler(changes.pop("seed", 5), (len(source),), (), changes.pop("repeats", 1))
    settings = {
        "order": chosen,
        "recipe": TrainTransform(28, RandAugment()),
        "batch": 8,
        "threads": 0,
    }
    return list(training_batches(source, steps=steps, **(settings | changes)))


def test_order_depends_on_neither_threads_nor_hosts_nor_resumes(source: MemorySource) -> None:
    whole = batches(source, range(6), repeats=3)
    assert [batch.images.shape for batch in whole] == [(8, 28, 28, 3)] * 6
    for hosts, threads, start in ((1, 3, 0), (2, 0, 0), (4, 2, 3), (1, 1, 5)):
        parts = [
            batches(source, range(start, 6), host=h, hosts=hosts, threads=threads, repeats=3)
            for h in range(hosts)
        ]
        for step, pieces in enumerate(zip(*parts, strict=True), start):
            np.testing.assert_array_equal(
                np.concatenate([piece.images for piece in pieces]), whole[step].images
            )
    other = batches(source, range(1), seed=6)
    assert np.any(other[0].images != whole[0].images)


def shared_memory() -> set[str]:
    place = Path("/dev/shm")
    return {path.name for path in place.iterdir()} if place.is_dir() else set()


def left_behind(before: set[str]) -> set[str]:
    """What is new in shared memory and stays there: other processes of this machine, as those of
    the tests beside this one, use it as well, but give theirs back.
    """
    deadline, left = time.monotonic() + 60, shared_memory() - before
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left &= shared_memory()
    return left


def test_order_does_not_depend_on_workers(photographs: Path, alone: None) -> None:
    """Also after a resume with another number of them; and nothing is left behind."""
    training = open_images([str(photographs)], held_out=HeldOut(0.0, 1, 1)).training
    whole = batches(training, range(3), batch=144, repeats=3)
    before = shared_memory()
    for workers, start in ((1, 0), (3, 1)):
        found = batches(training, range(start, 3), batch=144, repeats=3, workers=workers)
        for one, other in zip(found, whole[start:], strict=True):
            np.testing.assert_array_equal(one.images, other.images)
    ahead = training_batches(
        training,
        order=Sampler(5, (len(training),)),
        recipe=TrainTransform(28),
        batch=64,
        steps=range(1000),
        workers=1,
    )
    next(ahead)
    ahead.close()
    assert not left_behind(before)


SCRIPT = """
import sys
import numpy as np
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.data.dataset import open_images
from proteus_jax.data.sampler import Sampler
from proteus_jax.data.loader import training_batches
from proteus_jax.data.splits import HeldOut

if __name__ == "__main__":
    training = open_images([sys.argv[1]], held_out=HeldOut(0.0, 1, 1)).training
    batches = training_batches(training, order=Sampler(5, (40,)), recipe=TrainTransform(28),
                               batch=64, steps=range(4), workers=2)
    print(next(batches).images.sum())
"""


@pytest.mark.parametrize("kind", ["script", "notebook"])
def test_workers_of_a_script_end_with_it(
    photographs: Path, tmp_path: Path, alone: None, kind: str
) -> None:
    """Without absl.app, and without closing anything: no warning, nothing left. A notebook has, as
    `python -c`, no file that workers could import.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    before = shared_memory()
    code = [str(script)] if kind == "script" else ["-c", SCRIPT]
    done = subprocess.run(
        [sys.executable, *code, str(photographs)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (expected,) = batches(
        open_images([str(photographs)], held_out=HeldOut(0.0, 1, 1)).training,
        range(1),
        batch=64,
        recipe=TrainTransform(28),
    )
    assert int(done.stdout) == expected.images.sum()
    assert not left_behind(before)


def test_workers_end_with_a_killed_script(photographs: Path, tmp_path: Path, alone: None) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("sum())", "sum(), flush=True)\n    input()"))
    before = shared_memory()
    with subprocess.Popen(
        [sys.executable, str(script), str(photographs)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        process.kill()
        # The group lives as long as one of its processes does.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            process.poll()
            time.sleep(0.05)
        else:
            pytest.fail("its workers live on")
    assert not left_behind(before)


def images_of(order: Sampler, draws: int) -> np.ndarray:
    return np.array([order(draw).image for draw in range(draws)])


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own() -> None:
    epochs = images_of(Sampler(3, (10,)), 40).reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_repeats_follow_each_other() -> None:
    """Three epochs of as many draws as there are images see each image three times."""
    found = [Sampler(3, (10,), (), 3)(draw) for draw in range(30)]
    pictures = np.array([draw.image for draw in found]).reshape(10, 3)
    assert (pictures == pictures[:, :1]).all()
    assert sorted(pictures[:, 0]) == list(range(10))
    assert len({(draw.image, draw.repeat) for draw in found}) == 30


def test_hosts_never_share_a_view(source: MemorySource) -> None:
    """Within a batch every (image, repeat) is drawn once, whatever the number of hosts."""
    chosen = Sampler(0, (1000,), (), 3)
    for step in range(20):
        drawn = [chosen(step * 96 + slot) for slot in range(96)]
        assert len(set(drawn)) == 96
    for views in batches(source, range(3), batch=30, repeats=3):
        assert len({view.tobytes() for view in views.images}) == 30


def test_mixtures_hold_their_shares() -> None:
    """Exactly in every epoch, and each part sees all of its own before any of it again."""
    chosen = Sampler(1, (30, 10, 60), (2.0, 1.0, 1.0))
    drawn = images_of(chosen, 400)
    for epoch in drawn.reshape(4, 100):
        parts = np.digitize(epoch, [30, 40])
        assert Counter(parts.tolist()) == {0: 50, 1: 25, 2: 25}
    counts = Counter(drawn.tolist())
    for first, last, draws in ((0, 30, 200), (30, 40, 100), (40, 100, 100)):
        each = [counts[index] for index in range(first, last)]
        assert sum(each) == draws
        assert max(each) - min(each) <= 1
    assert sorted(images_of(Sampler(1, (30, 10, 60)), 100)) == list(range(100))
    assert shares(10, (1.0, 1.0, 1.0)) == (3, 4, 3)
    # A small part that fills half of an epoch goes round many times in it.
    half = images_of(Sampler(1, (90, 10), (1.0, 1.0)), 200)
    assert Counter(half[half >= 90].tolist()) == dict.fromkeys(range(90, 100), 10)


def test_parts_and_epochs_are_shuffled_apart() -> None:
    """Parts as long as each other do not take turns in step, nor does one repeat its order; and a
    part's own epoch goes on where the run's ended it.
    """
    drawn = images_of(Sampler(1, (12, 12), (3.0, 1.0)), 96)
    one, other = drawn[drawn < 12], drawn[drawn >= 12] - 12
    assert (len(one), len(other)) == (72, 24)
    # In the order of drawing an epoch of the run mixes; as sets each stretch is a part's epoch.
    for epoch in drawn.reshape(4, 24):
        assert Counter(Counter((epoch[epoch < 12]).tolist()).values()) == {1: 6, 2: 6}
    assert Counter(other[:12].tolist()) == dict.fromkeys(range(12), 1)
    firsts = [set(epoch[epoch >= 12].tolist()) for epoch in drawn.reshape(4, 24)]
    assert firsts[0].isdisjoint(firsts[1])
    assert firsts[2] != firsts[0]
    # As it was before the run's own shuffling: each part in an order of its own.
    places = sampler._permutation(1, sampler._EPOCH, 0, 24)
    arranged = np.empty(24, int)
    arranged[places] = images_of(Sampler(1, (12, 12), (1.0, 1.0)), 24)
    assert sorted(arranged[:12]) == list(range(12))
    assert (arranged[:12] != arranged[12:] - 12).any()
    assert images_of(Sampler(1, (20,)), 20).tolist() != images_of(Sampler(2, (20,)), 20).tolist()


def test_shares_add_up_whatever_the_weights() -> None:
    for total, weights in (
        (7, (1.0, 1.0)),
        (100, (0.1, 0.2, 0.7)),
        (5, (1e-9, 1.0)),
        (1, (1.0,) * 9),
    ):
        found = shares(total, weights)
        assert sum(found) == total
        for count, weight in zip(found, weights, strict=True):
            assert abs(count - total * weight / sum(weights)) <= 1


def shades(count: int) -> MemorySource:
    """Images each of one gray, which tells its number."""
    return MemorySource(
        [np.full((20, 30, 3), 8 * number, np.uint8) for number in range(count)],
        [str(number) for number in range(count)],
    )


class Broken(MemorySource):
    """Some of whose images cannot be read."""

    lost: tuple[int, ...] = (3,)

    def read(self, index: int) -> np.ndarray:
        if index in self.lost:
            raise Unreadable("broken")
        return super().read(index)


def test_numbers_are_those_of_the_images() -> None:
    """Also where another image stands in, whichever it is; each that is drawn is replaced anew."""
    whole = shades(10)
    source = Broken([whole.read(index) for index in range(10)], [str(n) for n in range(10)])
    found = list(
        training_batches(
            source,
            order=Sampler(5, (10,)),
            recipe=TrainTransform(12),
            batch=20,
            steps=range(12),
            threads=0,
        )
    )
    pixels, unreadable, numbers = (np.concatenate(part) for part in zip(*found, strict=True))
    np.testing.assert_array_equal(
        pixels, np.broadcast_to(8 * numbers[:, None, None, None], pixels.shape)
    )
    assert 3 not in numbers
    expected = np.array([Sampler(5, (10,))(draw).image for draw in range(240)])
    np.testing.assert_array_equal(unreadable, np.where(expected == 3, 3, -1))
    np.testing.assert_array_equal(numbers[expected != 3], expected[expected != 3])
    assert len(set(numbers[expected == 3].tolist())) > 5


def test_large_shares_are_put_together_from_all_draws() -> None:
    """More than a piece of 64 images a host, in several batches: each slot has its own draw."""
    source, order_of = shades(30), Sampler(5, (30,))
    for hosts in (1, 2):
        parts = [
            training_batches(
                source, order=order_of, recipe=TrainTransform(4), batch=300, steps=range(1, 3),
                host=host, hosts=hosts, threads=2,
            )
            for host in range(hosts)
        ]  # fmt: skip
        numbers = np.concatenate(
            [np.concatenate([part.numbers for part in step]) for step in zip(*parts, strict=True)]
        )
        expected = [order_of(draw).image for draw in range(300, 900)]
        np.testing.assert_array_equal(numbers, expected)


def test_views_of_one_image_differ_and_are_of_it(rng: np.random.Generator) -> None:
    """Held-out views: image after image, then all again by another draw."""
    pictures = [photograph(rng) for _ in range(3)]
    source = MemorySource(pictures, list("abc"))
    views, _ = held_out_views(source, count=9, size=16)
    for index in range(3):
        own = [views[turn * 3 + index] for turn in range(3)]
        assert len({view.tobytes() for view in own}) == 3
        expected = TrainTransform(16)(
            decode.open_image(pictures[index]), sampler.held_out_generator(index, 1)
        )
        np.testing.assert_array_equal(own[1], expected)
    gray, _ = held_out_views(shades(4), count=8, size=8)
    assert gray[:, 0, 0, 0].tolist() == [0, 8, 16, 24] * 2


def test_raw_bits_do_not_change_with_numpy() -> None:
    """The order of a run that is taken up in a year must be the one it began with."""
    assert sampler._permutation(7, 1, 2, 8).tolist() == [1, 3, 0, 6, 4, 7, 5, 2]


def test_an_unreadable_image_is_replaced_by_the_same_other(
    photographs: Path, tmp_path: Path, alone: None
) -> None:
    for number, path in enumerate(sorted(photographs.rglob("*.jpg"))):
        (tmp_path / f"{number}.jpg").write_bytes(path.read_bytes())
    broken = tmp_path / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    split = open_images([str(tmp_path)], held_out=HeldOut(0.0, 1, 1))
    assert split.passed_over.total == 0
    index = [split.training.name(i) for i in range(len(split.training))].index("3.jpg")
    first, again = (batches(split.training, range(4), threads=threads) for threads in (0, 2))
    seen = np.concatenate([batch.unreadable for batch in first])
    assert set(seen) == {-1, index}
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    spoilt = open_images([str(tmp_path)], held_out=HeldOut(0.0, 1, 1)).training
    for workers in (0, 1):
        with pytest.raises(InputError, match="32 images in a row cannot be read"):
            batches(spoilt, range(1), workers=workers)


def test_held_out_views_are_fixed(source: MemorySource) -> None:
    views, unreadable = held_out_views(source, count=25, size=28)
    assert views.shape == (25, 28, 28, 3)
    assert unreadable == []
    np.testing.assert_array_equal(held_out_views(source, count=25, size=28)[0], views)
    assert len(held_out_views(source, count=4, size=28)[0]) == 10


def test_held_out_images_that_cannot_be_read(source: MemorySource) -> None:
    broken = Broken([source.read(index) for index in range(3)], ["a", "b", "c"])
    broken.lost = (1,)
    views, unreadable = held_out_views(broken, count=9, size=28)
    assert len(views) == 6
    assert unreadable == [1]


def test_randomness_of_a_view_depends_on_nothing_before() -> None:
    one = sampler.ViewRandomness(3)
    for draw in (0, 7, 2**40, 7):
        fresh = np.random.Generator(
            np.random.Philox(key=[3, draw], counter=[0, 0, 0, sampler._VIEW])
        )
        found = one.at(draw)
        assert found.random(5).tolist() == fresh.random(5).tolist()
        assert found.integers(1000) == fresh.integers(1000)
        found.standard_normal(3)
