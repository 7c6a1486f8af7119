import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from jax.sharding import NamedSharding, PartitionSpec

from proteus_jax.methods.base import Batch
from proteus_jax.methods.losses import Losses, LossWeights
from proteus_jax.methods.masking import random_masks
from proteus_jax.methods.proteus import Proteus, student_losses
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.runtime import sharding
from proteus_jax.training.optimizer import adamw, decay_mask, scaled_learning_rate, warmup_cosine
from proteus_jax.training.train_state import TrainState, init_state
from proteus_jax.training.train_step import TrainStep, _mean_over_parts, ramp

TEACHER = BackboneFunction(TINY)
STUDENTS = {
    "small": StudentFunction(ViTSpec(width=16, depth=2, heads=2, grid=4), {"teacher": TINY.width}),
    "large": StudentFunction(ViTSpec(width=24, depth=1, heads=2, grid=4), {"teacher": TINY.width}),
}
BATCH = 16


def make(names: tuple[str, ...] = ("small",), **changes):
    """(train_step, init) of these students."""
    students = {name: STUDENTS[name] for name in names}
    schedule = warmup_cosine(1e-2, 2, 10)
    optimizer = adamw(schedule)
    settings = {
        "method": Proteus(loss_weights={"teacher": LossWeights()}, mask_ratio=0.5),
        "teachers": {"teacher": Teacher(TEACHER, IMAGENET)},
        "students": students,
        "optimizer": optimizer,
        "schedule": schedule,
        "normalization": IMAGENET,
        "ema_decay": 0.0,
        "seed": 3,
    } | changes
    return (
        TrainStep(**settings),
        lambda: init_state(students, optimizer, ema=settings["ema_decay"] > 0, seed=3),
    )


@pytest.fixture(scope="module")
def teacher_params() -> dict:
    return TEACHER.init(jax.random.key(1))


@pytest.fixture(scope="module")
def batches() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (3, BATCH, 56, 56, 3), dtype=np.uint8)


def run(step, state: TrainState, teacher_params: dict, batches) -> tuple[TrainState, list[dict]]:
    rows = []
    compiled = jax.jit(step)
    for images in batches:
        state, metrics = compiled(state, {"teacher": teacher_params}, images)
        rows.append(jax.device_get(metrics))
    return state, rows


@pytest.fixture(scope="module")
def single(teacher_params: dict, batches: np.ndarray) -> tuple[TrainState, list[dict]]:
    """Three steps of one student on one device."""
    step, init = make()
    return run(step, init(), teacher_params, batches)


def assert_close(found, expected, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * 1e-1),
        jax.device_get(found),
        jax.device_get(expected),
    )


@pytest.mark.parametrize(
    ("patches", "ratio"), [(16, 0.5), (49, 0.5), (256, 0.5), (49, 0.3), (9, 1.0)]
)
def test_masks_are_exact_and_uniform(patches: int, ratio: float) -> None:
    masks = np.asarray(random_masks(jax.random.key(0), 2000, patches, ratio))
    assert set(masks.sum(axis=1)) == {int(patches * ratio)}
    spread = np.abs(masks.mean(axis=0) - int(patches * ratio) / patches).max()
    # Five deviations of a share of 2000 draws.
    assert spread < 5 * 0.5 / 2000**0.5


def test_masked_half_equals_the_whole_batch_as_the_reference_runs_it(
    teacher_params: dict, batches: np.ndarray
) -> None:
    """Losses and gradients: the other half of the reference's masked pass feeds nothing."""
    student = STUDENTS["small"]
    params = student.init(jax.random.key(0))
    pixels = IMAGENET(jnp.asarray(batches[0]))
    target = TEACHER(teacher_params, pixels)
    half = random_masks(jax.random.key(5), BATCH // 2, 16, 0.5)
    whole = jnp.zeros((BATCH, 16), bool).at[::2].set(half)

    def losses(params: dict, mask: jax.Array, rows: slice):
        (found,) = student_losses(
            student,
            params,
            pixels,
            {"teacher": target},
            mask,
            {"teacher": LossWeights()},
            masked_rows=rows,
        ).values()
        return found.loss, found

    def grad(params: dict, mask: jax.Array, rows: slice):
        return jax.jit(jax.grad(functools.partial(losses, rows=rows), has_aux=True))(params, mask)

    with jax.default_matmul_precision("highest"):
        half_gradients, half_losses = grad(params, half, slice(None, None, 2))
        whole_gradients, whole_losses = grad(params, whole, slice(None))
    assert_close(half_losses, whole_losses, 1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole_gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
        half_gradients,
        whole_gradients,
    )


def test_losses_against_numpy(teacher_params: dict, batches: np.ndarray) -> None:
    """The three means written out by hand, with weights."""
    student = STUDENTS["small"]
    params = student.init(jax.random.key(0))
    pixels = IMAGENET(jnp.asarray(batches[0]))
    target = jax.device_get(TEACHER(teacher_params, pixels))
    mask = random_masks(jax.random.key(5), BATCH // 2, 16, 0.3)
    weights = LossWeights(2.0, 0.5, 3.0)
    targets = {"teacher": TEACHER(teacher_params, pixels)}
    (found,) = student_losses(student, params, pixels, targets, mask, {"teacher": weights}).values()
    said = jax.device_get(student(params, pixels, pixels[::2], mask)).by_teacher["teacher"]
    token = np.mean((said.token - target.cls) ** 2)
    everything = np.concatenate([said.token[:, None], said.feature], axis=1)
    taught = np.concatenate([target.cls[:, None], target.patches], axis=1)
    feature = np.mean((everything - taught) ** 2)
    chosen = np.asarray(mask)
    patch = np.mean((said.patch[chosen] - target.patches[::2][chosen]) ** 2)
    total = 2 * token + 0.5 * feature + 3 * patch
    assert_close(found, Losses(*map(jnp.asarray, (total, token, feature, patch))), 1e-5)


def test_several_students_equal_each_alone(
    teacher_params: dict, batches: np.ndarray, single: tuple[TrainState, list[dict]]
) -> None:
    step, init = make(("small", "large"))
    state, rows = run(step, init(), teacher_params, batches)
    for together, alone in zip(rows, single[1], strict=True):
        assert_close({key: together[key] for key in alone}, alone, 1e-5)
    assert_close(state.params["small"], single[0].params["small"], 1e-4)
    # Each starts as if it were alone, whatever its place among them.
    _, alone = make(("large",))
    jax.tree.map(np.testing.assert_array_equal, init().params["large"], alone().params["large"])


@pytest.mark.parametrize("changes", [{"grad_accum_steps": 4}, {"remat": "blocks"}])
def test_cheaper_in_memory_and_the_same(
    changes: dict,
    teacher_params: dict,
    batches: np.ndarray,
    single: tuple[TrainState, list[dict]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = dict(changes)
    monkeypatch.setattr(STUDENTS["small"], "remat", changes.pop("remat", "off"))
    step, init = make(**changes)
    _, rows = run(step, init(), teacher_params, batches)
    assert_close(rows[0], single[1][0], 1e-5)
    assert_close(rows, single[1], 1e-4)


def test_parts_of_a_batch_drop_other_branches() -> None:
    """Each part has a key of its own, its share of the masks, and pairs of images that belong
    together.
    """
    pixels = jnp.arange(12.0)[:, None, None, None] * jnp.ones((1, 2, 2, 3))
    mask = jnp.arange(6)[:, None] == jnp.arange(6)
    whole = Batch(pixels, mask, jax.random.key(0))

    def seen(part: Batch) -> dict[str, jax.Array]:
        drawn = jax.random.uniform(part.key)
        numbers = part.pixels[:, 0, 0, 0]
        return {
            "drawn": drawn,
            "squared": drawn**2,
            # The mask of a pair is that of its first image.
            "apart": jnp.sum(jnp.abs(numbers[::2] / 2 - part.draws.argmax(axis=1))),
            "pairs": jnp.sum(numbers[1::2] - numbers[::2]),
            "sum": jnp.sum(numbers),
        }

    found = _mean_over_parts(seen, whole, 3, 2)
    assert float(found["squared"] - found["drawn"] ** 2) > 1e-4
    assert (float(found["apart"]), float(found["pairs"])) == (0.0, 2.0)
    assert float(found["sum"]) == pytest.approx(66 / 3)
    assert float(_mean_over_parts(seen, whole, 1, 2)["sum"]) == 66


def test_precisions(batches: np.ndarray) -> None:
    """Matmuls bfloat16; LayerNorm, softmax, losses, stream, parameters and optimizer float32."""
    teacher = BackboneFunction(TINY, jnp.bfloat16)
    student = StudentFunction(STUDENTS["small"].spec, {"teacher": TINY.width}, jnp.bfloat16)
    optimizer = adamw(1e-3, first_moment=jnp.bfloat16)
    teachers = {"teacher": Teacher(teacher, IMAGENET)}
    step, _ = make(teachers=teachers, students={"small": student}, optimizer=optimizer)
    state = init_state({"small": student}, optimizer, ema=False, seed=0)
    weights = jax.tree.map(
        lambda array: array.astype(jnp.bfloat16), teacher.init(jax.random.key(0))
    )
    params = {"teacher": weights}
    shapes = jax.eval_shape(step, state, params, batches[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[0].params)} == {jnp.dtype("float32")}
    moments = shapes[0].optimizer["small"][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {jnp.dtype("float32")}
    counts = {shapes[1].pop(name).dtype for name in ("skipped", "skipped_in_a_row")}
    assert counts == {jnp.dtype("int32")}
    assert {leaf.dtype for leaf in shapes[1].values()} == {jnp.dtype("float32")}

    found: dict[str, set[str]] = {}
    for equation in equations(jax.make_jaxpr(step)(state, params, batches[0]).jaxpr):
        kinds = {str(value.aval.dtype) for value in equation.invars}
        found.setdefault(equation.primitive.name, set()).update(kinds)
    assert found["dot_general"] == {"bfloat16"}
    for name in ("exp", "log", "erf", "rsqrt", "reduce_max"):
        assert found[name] == {"float32"}, name
    # The stream between the blocks.
    features = jax.eval_shape(student, student.shapes, jnp.zeros((2, 56, 56, 3))).features
    assert features.patches.dtype == jnp.float32


def equations(jaxpr):
    """All of a jaxpr's equations, those inside loops and branches too."""
    for equation in jaxpr.eqns:
        inside = [
            part
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple | list) else [value])
        ]
        inside = [getattr(part, "jaxpr", part) for part in inside]
        inside = [part for part in inside if hasattr(part, "eqns")]
        for part in inside:
            yield from equations(part)
        if not inside:
            yield equation


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_many_devices_equal_one(
    fsdp: int,
    teacher_params: dict,
    batches: np.ndarray,
    single: tuple[TrainState, list[dict]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The tiny arrays of this test are to be split as large ones are.
    monkeypatch.setattr(sharding, "SMALL", 64)
    mesh = sharding.make_mesh(fsdp)
    step, init = make()
    places = sharding.shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=places)()
    placed = {"teacher": sharding.place_tree(teacher_params, mesh)}
    kernel = state.params["small"]["backbone"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (fsdp == 1)
    rows = []
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
    for images in batches:
        state, metrics = compiled(state, placed, sharding.place_batch(images, mesh))
        rows.append(jax.device_get(metrics))
    assert_close(rows[0], single[1][0], 1e-5)
    assert_close(rows, single[1], 1e-4)


def test_the_sharding_rule() -> None:
    mesh = sharding.make_mesh(4)
    tree = {
        "large": jax.ShapeDtypeStruct((3, 512, 1024), jnp.float32),
        "odd": jax.ShapeDtypeStruct((513, 1023), jnp.float32),
        "first": jax.ShapeDtypeStruct((1024, 511), jnp.float32),
        "small": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    whole = NamedSharding(mesh, PartitionSpec())
    assert sharding.shardings(tree, mesh) == {
        "large": NamedSharding(mesh, PartitionSpec(None, None, "fsdp")),
        "odd": whole,
        "first": NamedSharding(mesh, PartitionSpec("fsdp")),
        "small": whole,
    }
    with pytest.raises(ValueError, match="8 devices do not divide into groups of 3"):
        sharding.make_mesh(3)


def test_randomness_is_a_function_of_the_step(
    teacher_params: dict, batches: np.ndarray, single: tuple[TrainState, list[dict]]
) -> None:
    """A state put down and taken up again goes the same way; another seed does not."""
    step, init = make()
    compiled = jax.jit(step)
    state, _ = run(step, init(), teacher_params, batches[:2])
    state = jax.tree.map(jnp.asarray, jax.device_get(state))
    _, metrics = compiled(state, {"teacher": teacher_params}, batches[2])
    assert float(metrics["small/patch_loss"]) == float(single[1][2]["small/patch_loss"])
    other, _ = make(seed=4)
    _, metrics = jax.jit(other)(state, {"teacher": teacher_params}, batches[2])
    assert float(metrics["small/patch_loss"]) != float(single[1][2]["small/patch_loss"])
    assert float(metrics["small/token_loss"]) == float(single[1][2]["small/token_loss"])


def test_average_follows_the_backbone(teacher_params: dict, batches: np.ndarray) -> None:
    step, init = make(ema_decay=0.9)
    state, _ = run(step, init(), teacher_params, batches[:2])
    expected = init().params["small"]["backbone"]
    now = init()
    # A young average forgets its random start.
    for images, decay in zip(batches[:2], (1 / 10, 2 / 11), strict=True):
        now, _ = jax.jit(step)(now, {"teacher": teacher_params}, images)
        expected = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new,
            expected,
            now.params["small"]["backbone"],
        )
    assert state.ema is not None
    assert_close(state.ema["small"], expected, 1e-5)


def test_an_averages_decay_grows_to_its_own() -> None:
    updates = jnp.array([0, 90, 10**6])
    np.testing.assert_allclose(jnp.minimum(0.99996, ramp(updates)), [0.1, 0.91, 0.99996], 1e-5)


def test_without_a_patch_loss_nothing_is_masked(teacher_params: dict, batches: np.ndarray) -> None:
    weights = {"teacher": LossWeights(1.0, 1.0, 0.0)}
    step, init = make(method=Proteus(loss_weights=weights, mask_ratio=0.5))
    # An odd batch: nothing is halved.
    state, (row,) = run(step, init(), teacher_params, batches[:1, :15])
    assert row["small/patch_loss"] == 0
    before, after = (
        at.params["small"]["heads"]["teacher"]["patch"]["norm"]["bias"] for at in (init(), state)
    )
    np.testing.assert_array_equal(after, before)


def test_an_update_that_is_not_finite_is_skipped(
    teacher_params: dict, batches: np.ndarray, single: tuple[TrainState, list[dict]]
) -> None:
    """Nothing but the counters moves; the next good step goes on as if it were the first."""
    step, init = make(ema_decay=0.9)
    compiled = jax.jit(step)
    state, _ = compiled(init(), {"teacher": teacher_params}, batches[0])
    # The last one's losses and gradients are numbers, of which AdamW would keep infinite squares.
    spoilt = (("cls_token", np.nan), ("cls_token", np.inf), ("norm/bias", 1e18))
    for count, (name, value) in enumerate(spoilt, 1):
        broken = _added(teacher_params, name, value)
        after, metrics = compiled(state, {"teacher": broken}, batches[1])
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (count, count)
        assert int(after.step) == int(state.step) + 1
        for old, new in zip(state[1:-1], after[1:-1], strict=True):
            jax.tree.map(np.testing.assert_array_equal, old, new)
        state = after
    state, metrics = compiled(state, {"teacher": teacher_params}, batches[2])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (3, 0)
    assert np.isfinite(metrics["small/loss"])


def _added(params: dict, name: str, value: float) -> dict:
    first, _, rest = name.partition("/")
    return {**params, first: _added(params[first], rest, value) if rest else params[first] + value}


def test_schedule_is_timms_by_step() -> None:
    schedule: Any = warmup_cosine(1e-3, 5, 300)
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert float(schedule(4)) == pytest.approx(1e-6 + 4 * (1e-3 - 1e-6) / 5)
    # The cosine counts from 0: at the end of the warm-up it has already begun.
    for step in (5, 150, 298):
        expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * step / 300))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)
    assert float(schedule(400)) == pytest.approx(1e-5)
    without: Any = warmup_cosine(1e-3, 0, 10)
    assert float(without(0)) == pytest.approx(1e-3)
    assert scaled_learning_rate(1024) == pytest.approx(1e-3)


def test_vectors_and_biases_are_not_decayed() -> None:
    mask = decay_mask(STUDENTS["small"].shapes)
    backbone = mask["backbone"]
    assert backbone["blocks"]["attn"]["qkv"] == {"kernel": True, "bias": False}
    assert backbone["blocks"]["norm1"] == {"scale": False, "bias": False}
    assert backbone["blocks"]["ls1"] == {"gamma": False}
    assert backbone["pos_embed"] is backbone["cls_token"] is backbone["mask_token"] is True
    assert mask["heads"]["teacher"]["token"]["linear"] == {"kernel": True, "bias": False}


def test_optimizer_is_pytorchs() -> None:
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    start = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    theirs = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.05)
    ours = adamw(1e-2)
    params: Any = {"kernel": jnp.asarray(start)}
    state = ours.init(params)
    for step in range(5):
        gradient = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
        weight.grad = torch.from_numpy(gradient)
        theirs.step()
        updates, state = ours.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], weight.detach().numpy(), atol=1e-6)
