"""The protocol robustness: a linear head of ImageNet on ImageNet-A, -R, -Sketch, -V2 and -C.

The head is one that the protocol linear has trained and chosen. Sets that show only some of the
classes are scored among those classes alone, as their authors do. mCE: errors over five severities,
relative to AlexNet's, mean of the 15 corruptions (Hendrycks and Dietterich 2019, arXiv 1903.12261).
"""

import functools
import itertools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.data.datasets.labeled import LabeledDataset, open_labeled
from proteus_jax.data.passed_over import PassedOver, joined
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.errors import InputError, about, collecting
from proteus_jax.evaluation.classifiers.linear_heads import Kind, last_tokens
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import compiled_pass, feature_pass
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.evaluation.protocols.linear import HEAD
from proteus_jax.models.config import ViTSpec
from proteus_jax.schema import Rule

PLAIN = ("imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2")
CORRUPTED, SEVERITIES = "imagenet-c", range(1, 6)
# Published: AlexNet's mean error over the severities.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


class Settings(NamedTuple):
    """The workdir of a linear evaluation of the same model."""

    head: str


class Head(NamedTuple):
    """A linear head: what it sees, weights [f, classes], biases, its classes' names, the digest of
    the model that it was trained on, and the protocol that trained it.
    """

    kind: Kind
    weight: np.ndarray
    bias: np.ndarray
    classes: tuple[str, ...]
    model: str
    protocol: str


class Data(NamedTuple):
    """The head, the sets that are there (those of corruptions by severity), and what is absent."""

    head: Head
    plain: dict[str, LabeledDataset]
    corrupted: dict[str, dict[int, LabeledDataset]]
    absent: dict[str, str]

    @property
    def passed_over(self) -> PassedOver:
        """Sums what the folders of the sets hold beside images."""
        levels = itertools.chain(*(part.values() for part in self.corrupted.values()))
        return joined(part.passed_over for part in (*self.plain.values(), *levels))


def open_head(directory: str) -> Head:
    """Opens the head in the workdir of a linear evaluation; InputError where there is none."""
    path = Path(directory).expanduser() / HEAD
    if not path.is_file():
        raise InputError(
            f"expected the workdir of a linear evaluation, which holds {HEAD}, found {directory!r}"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = Head(
                Kind(int(arrays["blocks"]), bool(arrays["pooled"])),
                arrays["weight"].astype(np.float32),
                arrays["bias"].astype(np.float32),
                tuple(str(name) for name in arrays["classes"]),
                str(arrays["model"]),
                str(arrays["protocol"]),
            )
        classes = (len(head.classes),)
        if head.weight.ndim != 2 or not head.weight.shape[1:] == head.bias.shape == classes:
            raise ValueError(f"weights {head.weight.shape}, {len(head.classes)} classes")
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no linear head: {error}") from None
    return head


def open_data(config: EvalConfig) -> Data:
    """The head of --config.robustness.head, and what of the sets lies below --config.data.root."""
    problems, head = [], None
    with collecting(problems, "--config.robustness.head"):
        head = open_head(config.settings.head)
    root = Path(config.data.root).expanduser()
    if not config.data.root or not root.is_dir():
        problems.append(
            f"--config.data.root: expected a folder with one or more of {', '.join(PLAIN)} and "
            f"{CORRUPTED}, found {config.data.root!r}"
        )
    if problems or head is None:
        raise InputError(problems)
    plain, corrupted, absent = {}, {}, {}
    reading = config.data.reading
    with about("--config.data.root"):
        for name in PLAIN:
            if (root / name).is_dir():
                plain[name] = _matched(open_labeled(str(root / name), reading), head, name)
            else:
                absent[name] = f"no folder {name}"
        for name in ALEXNET:
            place = root / CORRUPTED / name
            levels = {level: place / str(level) for level in SEVERITIES}
            missing = [level for level, path in levels.items() if not path.is_dir()]
            if missing:
                absent[f"{CORRUPTED}/{name}"] = f"no folder of severity {missing[0]}"
                continue
            corrupted[name] = {
                level: _matched(open_labeled(str(path), reading), head, f"{name}/{level}")
                for level, path in levels.items()
            }
    if not plain and not corrupted:
        raise InputError(f"--config.data.root: {root}: none of {', '.join(PLAIN)}, {CORRUPTED}")
    return Data(head, plain, corrupted, absent)


def _matched(labeled: LabeledDataset, head: Head, name: str) -> LabeledDataset:
    """Labels as numbers of the head's classes: by name, or where folders are numbers (-V2) by the
    place among the sorted names.
    """
    number = {kind: at for at, kind in enumerate(head.classes)}
    if not number.keys() & set(labeled.classes) and all(
        kind.isdecimal() for kind in labeled.classes
    ):
        number = {str(at): at for at in range(len(head.classes))}
    strange = [kind for kind in labeled.classes if kind not in number]
    if strange:
        raise InputError(
            f"{name}: {len(strange)} of its classes are none of the head's, as {strange[0]}; the "
            f"head has {len(head.classes)}, as {head.classes[0]}"
        )
    own = np.array([number[kind] for kind in labeled.classes])
    return LabeledDataset(labeled.source, own[labeled.labels], head.classes)


def check(config: EvalConfig, spec: ViTSpec, digest: Callable[[], str]) -> list[str]:
    """The head must be one of this model."""
    try:
        head = open_head(config.settings.head)
    except InputError:
        return []
    if head.model != digest():
        return [
            "--config.robustness.head: was trained on another model, whose weights have the digest "
            f"{head.model}; those of {config.model} have {digest()}"
        ]
    return []


def measure(context: Context, data: Data) -> dict[str, Any]:
    """`top1` is {set: percent}; `mce` the mean corruption error in percent where all fifteen are
    there, null otherwise.
    """
    top1, unreadable = {}, 0
    for name, part in data.plain.items():
        share, lost = _accuracy(context, data.head, part, name, context.view)
        top1[name], unreadable = 100 * share, unreadable + lost
        context.say(f"  {name:18}{top1[name]:6.2f} %")
    errors = {}
    for name, levels in data.corrupted.items():
        errors[name] = {}
        for level, part in levels.items():
            title = f"{name}, severity {level}"
            # Its files are cut to 224 px already: to resize them again would soften the noise.
            whole = CenterCrop(context.view.crop, context.view.crop)
            share, lost = _accuracy(context, data.head, part, title, whole)
            errors[name][str(level)], unreadable = 1 - share, unreadable + lost
        context.say(f"  {name:18}{100 * np.mean([*errors[name].values()]):6.2f} % wrong")
    mce = None
    if len(errors) == len(ALEXNET):
        mce = mean_corruption_error(errors)
        context.say(f"  {'mCE':18}{mce:6.2f}")
    for name, reason in data.absent.items():
        context.say(f"  {name:18}absent: {reason}")
    return {
        "top1": top1,
        "mce": mce,
        "corruptions": errors,
        "absent": data.absent,
        "data": {
            "root": context.config.data.root,
            "images": {name: len(part.labels) for name, part in data.plain.items()},
            "unreadable": unreadable,
            "passed_over": data.passed_over.as_json(),
        },
        "constants": {
            "alexnet": ALEXNET,
            "resize_of_corrupted": context.view.crop,
            "head": data.head.kind._asdict() | {"protocol": data.head.protocol},
        },
    }


def mean_corruption_error(errors: dict[str, dict[str, float]]) -> float:
    """Mean corruption error in percent, from errors of 0 to 1 by corruption and severity."""
    relative = [np.mean([*levels.values()]) / ALEXNET[name] for name, levels in errors.items()]
    return 100 * float(np.mean(relative))


def _accuracy(
    context: Context, head: Head, part: LabeledDataset, title: str, view: CenterCrop
) -> tuple[float, int]:
    """Share right, among the classes that the set shows, and how many images could not be read."""
    frozen = context.frozen
    shown = np.unique(part.labels)
    tokens = functools.partial(last_tokens, blocks=head.kind.blocks)

    def predict(params: Any, images: jax.Array) -> jax.Array:
        seen = head.kind.of(tokens(frozen.backbone, params[0], frozen.normalization(images)))
        scores = jnp.matmul(seen, params[1], precision=jax.lax.Precision.HIGHEST) + params[2]
        return scores.argmax(axis=1).astype(jnp.int32)

    table = feature_pass(
        compiled_pass(predict, context.mesh),
        (frozen.params, head.weight[:, shown], head.bias[shown]),
        part.source,
        view,
        context.reading,
        context.mesh,
        progress=lambda text: context.progress(f"{title}: {text}"),
    )
    right = shown[table.values] == part.labels[table.numbers]
    return float(np.mean(right)), table.unreadable


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy on each set, and the mean corruption error where it is whole."""
    mce = results["mce"]
    return results["top1"] | ({} if mce is None else {"mce": mce})


def cells(results: Mapping[str, Any]) -> dict[str, float]:
    """The columns of the paper's table."""
    names = dict(zip(PLAIN, ("A", "R", "Sketch", "V2"), strict=True)) | {"mce": "mCE"}
    return {names[name]: value for name, value in scores(results).items()}


PROTOCOL = Protocol(
    name="robustness",
    settings=Settings,
    rules={"head": Rule(lambda value: isinstance(value, str), "a folder, or nothing")},
    open=open_data,
    measure=measure,
    scores=scores,
    cells=cells,
    check=check,
)
