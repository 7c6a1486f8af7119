"""The probe of many heads against the same arithmetic written out in numpy."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Heard
from small import RATES, context_for

from proteus_jax.data.datasets.labeled import LabeledDataset, open_pair
from proteus_jax.data.sources.base import MemorySource
from proteus_jax.errors import InputError, Interrupted, Unreadable
from proteus_jax.evaluation import linear_training
from proteus_jax.evaluation.classifiers import linear_heads
from proteus_jax.evaluation.classifiers.linear_heads import Kind, Probe, Tokens
from proteus_jax.evaluation.protocol import Saving
from proteus_jax.evaluation.protocols import linear
from proteus_jax.feature_extractor import Model
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.runtime import sharding
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.weights.model_dir import load_model

KINDS = tuple(Kind(n, pooled) for n in (1, 2) for pooled in (False, True))


def seen(tokens: Tokens, kind: Kind) -> np.ndarray:
    parts = [np.asarray(tokens.cls)[:, i] for i in range(2)][-kind.blocks :]
    return np.concatenate([*parts, np.asarray(tokens.mean)] if kind.pooled else parts, axis=1)


def sgd(weight, bias, inputs, targets, rate: float, steps: int, batch: int):
    """One head alone: PyTorch's SGD with momentum and cosine annealing."""
    velocity: list[Any] = [np.zeros_like(weight), np.zeros_like(bias)]
    for step in range(steps):
        x, y = inputs[step], targets[step]
        scores = x @ weight + bias
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        error = (share - np.eye(len(bias))[y]) / len(x)
        gradients = [x.T @ error, error.sum(axis=0)]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        now = rate * batch / 256 * 0.5 * (1 + np.cos(np.pi * step / steps))
        weight, bias = weight - now * velocity[0], bias - now * velocity[1]
    return weight, bias


def test_every_head_is_trained_as_if_alone(rng: np.random.Generator) -> None:
    steps, batch, width, classes = 4, 6, 5, 3
    probe = Probe(KINDS, RATES, classes, steps, batch)
    state = probe.init(width, 0)
    first = jax.device_get(state["heads"])
    batches = [
        Tokens(
            jnp.asarray(rng.normal(size=(batch, 2, width)), jnp.float32),
            jnp.asarray(rng.normal(size=(batch, width)), jnp.float32),
        )
        for _ in range(steps)
    ]
    labels = rng.integers(0, classes, (steps, batch))
    update = jax.jit(probe.update)
    for step, tokens in enumerate(batches):
        state, loss = update(state, tokens, jnp.asarray(labels[step]), np.float32(step))
        if step == 0:
            assert float(loss) == pytest.approx(np.log(3), abs=0.1)
    logits = probe.logits(state["heads"], batches[0])
    assert logits.shape == (batch, len(probe.names), classes)
    names = iter(enumerate(probe.names))
    for number, kind in enumerate(KINDS):
        inputs = [seen(tokens, kind) for tokens in batches]
        for place, rate in enumerate(RATES):
            column, name = next(names)
            assert name == f"blocks_{kind.blocks}_avgpool_{str(kind.pooled).lower()}_lr_{rate:g}"
            begun = first[number]
            weight, bias = sgd(
                begun["weight"][:, place].astype(np.float64),
                begun["bias"][place].astype(np.float64),
                inputs,
                labels,
                rate,
                steps,
                batch,
            )
            np.testing.assert_allclose(
                logits[:, column], inputs[0] @ weight + bias, rtol=2e-4, atol=2e-5
            )


def test_a_probe_learns_and_names_both_choices(
    tiny_teacher: Path, labeled_folder: Path, tmp_path: Path
) -> None:
    model = Model(*load_model(tiny_teacher))
    context, said = context_for(labeled_folder, model, tmp_path)
    pair = open_pair(str(labeled_folder))
    found = linear.measure(context, pair)
    assert found["protocol"] == "linear"
    assert len(found["top1"]) == len(found["held_out_top1"]) == 12
    assert found["data"]["held_out_images"] == 9
    # Six epochs of the 33 images that are learned from, 16 at a time.
    assert found["constants"]["steps"] == 12
    best = max(found["top1"].values())
    assert best > 80
    assert found["best"]["test"]["top1"] == best
    chosen = found["best"]["held_out"]["head"]
    assert found["held_out_top1"][chosen] == max(found["held_out_top1"].values())
    assert "the paper's way" in said[0]


class Shades(MemorySource):
    """Grays, one of which cannot be read: the fourth of fourteen images of three classes."""

    def __init__(self):
        pixels = [np.full((32, 32, 3), 15 * number, np.uint8) for number in range(14)]
        super().__init__(pixels, [str(number) for number in range(14)])

    def read(self, index: int) -> np.ndarray:
        if index == 3:
            raise Unreadable("broken")
        return super().read(index)


@pytest.mark.parametrize("cache", [False, True])
def test_a_probe_that_is_stopped_goes_on_where_it_was(
    cache: bool, tiny_teacher: Path, labeled_folder: Path, tmp_path: Path
) -> None:
    """To the same heads, bit for bit; what was saved of another probe is not gone on from."""
    model = Model(*load_model(tiny_teacher))
    pair = open_pair(str(labeled_folder))
    probe = Probe(KINDS, RATES, len(pair.train.classes), steps=5, batch=16)
    tokens = functools.partial(linear_heads.last_tokens, blocks=2)
    heard = Heard()

    def heads(where: str, handler: PreemptionHandler, probe: Probe = probe) -> list[Any]:
        context, _ = context_for(labeled_folder, model, tmp_path, cache=cache)
        saving = Saving(str(tmp_path / where), heard, handler)
        context = context._replace(saving=saving)
        return linear_training.train_heads(context, probe, tokens, pair.train)

    def quiet() -> PreemptionHandler:
        return PreemptionHandler(300.0, heard.line)

    whole = heads("whole", quiet())
    asked = quiet()
    asked.requested = True
    with pytest.raises(Interrupted, match="at step 1 of 5 of the probe; the same"):
        heads("stopped", asked)
    resumed = heads("stopped", quiet())
    assert heard.lines.count("the probe goes on from step 1") == 1
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, resumed))
    # A save that was killed leaves a part, which is in nobody's way.
    part = tmp_path / "stopped" / "5.orbax-checkpoint-tmp-0"
    part.mkdir()
    # Its end is kept too: nothing is trained again.
    again = heads("stopped", quiet())
    assert "the probe goes on from step 5" in heard.lines
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, again))
    assert not part.exists()
    asked = quiet()
    asked.requested = True
    with pytest.raises(Interrupted, match="goes on from step 5"):
        heads("stopped", asked)
    other = heads("stopped", quiet(), probe._replace(rates=(0.01, 0.02, 0.03)))
    assert "the probe that was saved here is of something else: begun anew" in heard.lines
    assert not bool((other[0]["weight"] == whole[0]["weight"]).all())


LABELS = np.array([0, 2, 1, 1, 0, 0, 2, 2, 1, 0, 1, 2, 0, 1])


def grays(backbone: Any, params: Any, pixels: jax.Array) -> Tokens:
    """In the place of a model's tokens: how bright an image is, from 0 to 13 with steps of 15."""
    scaled = pixels.mean(axis=(1, 2, 3)) * np.mean(IMAGENET.std) + np.mean(IMAGENET.mean)
    bright = scaled[:, None] * 255 / 15
    return Tokens(jnp.stack([bright, bright], axis=1), bright)


def test_labels_follow_their_images_where_one_is_broken(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learning from crops, from features just made and from those kept before, and testing."""
    model = Model(*load_model(tiny_teacher))
    learned = LabeledDataset(Shades(), LABELS, ("a", "b", "c"))
    context, _ = context_for(tmp_path, model, tmp_path)
    probe = Probe(KINDS[:1], (0.1,), 3, steps=3, batch=16)
    seen: list[np.ndarray] = []
    place = sharding.place_batch
    monkeypatch.setattr(
        sharding, "place_batch", lambda array, mesh: seen.append(array) or place(array, mesh)
    )
    tokens_of = functools.partial(linear_heads.last_tokens, blocks=2)
    linear_training.train_heads(context, probe, tokens_of, learned)
    assert len(seen) == 6
    for pixels, labels in zip(seen[::2], seen[1::2], strict=True):
        numbers = pixels[:, 0, 0, 0] // 15
        assert 3 not in numbers
        np.testing.assert_array_equal(labels, LABELS[numbers])
    for _ in range(2):
        tokens, labels = linear_training._kept_features(context, grays, learned)
        numbers = np.asarray(tokens.mean)[:, 0].round().astype(int)
        assert numbers.tolist() == [0, 1, 2, *range(4, 14)]
        np.testing.assert_array_equal(labels, LABELS[numbers])
    # As many other images are other images.
    others = Shades()
    others._pictures[5] = others._pictures[0]
    others.fingerprint = "another"
    darker = LabeledDataset(others, LABELS, ("a", "b", "c"))
    tokens, _ = linear_training._kept_features(context, grays, darker)
    assert np.asarray(tokens.mean)[4, 0].round() == 0
    # A head that answers with the middle class.
    heads = [{"weight": jnp.zeros((1, 1, 3)), "bias": jnp.array([[0.0, 1.0, 0.0]])}]
    found = linear._run_heads(context, probe, grays, learned, heads, "test")
    assert found.unreadable == 1
    np.testing.assert_array_equal(found.labels, np.delete(LABELS, 3))
    np.testing.assert_array_equal(found.right[:, 0], np.delete(LABELS, 3) == 1)


def test_the_head_that_is_kept_is_chosen_by_images_held_out(
    tiny_teacher: Path, labeled_folder: Path, tmp_path: Path
) -> None:
    """Of a test set whose classes have changed places, the best head is another."""
    model = Model(*load_model(tiny_teacher))
    context, _ = context_for(labeled_folder, model, tmp_path)
    pair = open_pair(str(labeled_folder))
    moved = LabeledDataset(pair.test.source, (pair.test.labels + 1) % 3, pair.test.classes)
    found = linear.measure(context, pair._replace(test=moved))
    best = found["best"]
    assert best["test"]["head"] != best["held_out"]["head"]
    assert best["test"]["top1"] == max(found["top1"].values()) > best["held_out"]["top1"]
    chosen = best["held_out"]["head"]
    assert found["held_out_top1"][chosen] == max(found["held_out_top1"].values()) > 80
    assert found["top1"][chosen] == best["held_out"]["top1"]
    by_class = [row["top1"] for row in found["per_class"].values()]
    assert np.mean(by_class) == pytest.approx(best["held_out"]["top1"])
    head = np.load(tmp_path / linear.HEAD)
    kind = Kind(int(head["blocks"]), bool(head["pooled"]))
    assert chosen.startswith(kind.name(0.0).removesuffix("0"))
    table = context.frozen.table(
        lambda *of: linear_heads.last_tokens(*of, blocks=2),
        moved.source,
        context.view,
        context.reading,
    )
    right = (seen(table.values, kind) @ head["weight"] + head["bias"]).argmax(axis=1)
    share = 100 * np.mean(right == moved.labels[table.numbers])
    assert share == pytest.approx(best["held_out"]["top1"])


def test_no_class_is_held_out_whole(labeled_folder: Path) -> None:
    whole = open_pair(str(labeled_folder)).train
    few = whole.part(np.array([0, 1, 14, 28, 29]))
    learned, out = linear.hold_out(few, 0.9)
    assert learned.labels.tolist() == [0, 1, 2]
    assert out is not None
    assert sorted(out.labels.tolist()) == [0, 2]


def test_kept_features_are_another_protocol_and_are_made_once(
    tiny_teacher: Path, labeled_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(*load_model(tiny_teacher))
    pair = open_pair(str(labeled_folder))
    context, _ = context_for(labeled_folder, model, tmp_path, cache=True, held_out=0.0)
    first = linear.measure(context, pair)
    assert first["protocol"] == "linear, frozen crops"
    assert list(first["best"]) == ["test"]
    stamp = (tmp_path / "features-cls.npy").stat().st_mtime_ns
    assert linear.measure(context, pair)["top1"] == first["top1"]
    assert (tmp_path / "features-cls.npy").stat().st_mtime_ns == stamp
    # A spoilt or missing file is made again.
    (tmp_path / "features-mean.npy").write_bytes(b"\x93NUMPY")
    assert linear.measure(context, pair)["top1"] == first["top1"]
    (tmp_path / "features-cls.npy").unlink()
    assert linear.measure(context, pair)["top1"] == first["top1"]
    (tmp_path / "features.json").write_text("{")
    monkeypatch.setattr(linear_training.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="do not fit into"):
        linear.measure(context, pair)
