"""Labels of tar shards, as WebDataset, img2dataset and people's own scripts write them.

A wrong label is worse than none: it belongs to the image beside it whose name is the same up to
the suffix, and what is not clear is refused with its name.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from proteus_jax.data.image_formats import suffix_of

# Suffixes of members that hold nothing but a label, and fields that name it in members of JSON.
LABEL_SUFFIXES = (".cls", ".cls2", ".class", ".label")
_TEXT = ".txt"
JSON = ".json"
_FIELDS = ("label", "cls", "class", "class_id", "label_id", "class_name", "category", "fine_label")
# A label is a number or a name, not a text.
MOST_BYTES = 256


class Member(NamedTuple):
    """A file of a shard: an image (`label` is None), or a label, which is its text or a problem."""

    name: str
    offset: int
    size: int
    label: str | None = None
    problem: str = ""


class Label(NamedTuple):
    """The label of an image, as text, or why it has none ("": none is there)."""

    text: str | None
    problem: str = ""


def is_label(name: str) -> bool:
    """Returns True for the name of a member that holds a label: .cls and the like, in any case,
    perhaps followed by .txt.
    """
    suffix = suffix_of(name)
    return (suffix_of(name[: -len(_TEXT)]) if suffix == _TEXT else suffix) in LABEL_SUFFIXES


def read_label(name: str, content: bytes) -> Member | None:
    """Reads a member that may tell a label; None for a JSON that tells none."""
    if suffix_of(name) == JSON:
        return _of_json(name, content)
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or "\n" in text or len(content) > MOST_BYTES:
        shown = content[:40]
        return Member(name, 0, 0, "", f"{name}: expected a class, found {shown!r}")
    return _checked(name, text)


def _of_json(name: str, content: bytes) -> Member | None:
    try:
        values = json.loads(content)
    except ValueError:
        return None
    fields = [field for field in _FIELDS if isinstance(values, dict) and field in values]
    if not fields:
        return None
    value = values[fields[0]]
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return Member(name, 0, 0, "", f"{name}: expected a class in {fields[0]}, found {value!r}")
    return _checked(name, str(value).strip())


def _checked(name: str, text: str) -> Member:
    number = _number(text)
    if number is not None and number < 0:
        return Member(name, 0, 0, "", f"{name}: expected a class, found {text}")
    return Member(name, 0, 0, text if number is None else str(number))


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def labels_of(members: Sequence[Member]) -> list[Label]:
    """The label of each image of a shard, in their order; `members` are its images and labels in
    the order in which they lie there.
    """
    labels: dict[int, Label] = {}
    for group in _samples(members):
        _pair(members, group, labels)
    for group in _runs_of_a_key(members):
        if not any(at in labels for at in group):
            _pair(members, group, labels)
    _pair_apart(members, labels)
    return [
        labels.get(at, Label(None)) for at, member in enumerate(members) if member.label is None
    ]


def _stem(name: str) -> str:
    """A name without its last suffix, or without that of a label and .txt."""
    path = PurePosixPath(name)
    if path.suffix.lower() == _TEXT:
        path = path.with_suffix("")
    return str(path.with_suffix(""))


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.parent / path.name.split(".")[0])


def _samples(members: Sequence[Member]) -> Iterator[list[int]]:
    """Runs of members with one stem; a suffix that comes again begins the next."""
    group: list[int] = []
    seen: set[str] = set()
    for at, member in enumerate(members):
        suffix = suffix_of(member.name)
        if group and (suffix in seen or _stem(member.name) != _stem(members[at - 1].name)):
            yield group
            group, seen = [], set()
        seen.add(suffix)
        group.append(at)
    if group:
        yield group


def _runs_of_a_key(members: Sequence[Member]) -> Iterator[list[int]]:
    """One image and its labels with nothing between, where what differs in their names is words:
    s1.input.jpg and s1.target.cls are one sample of WebDataset, 22.1.jpg and 22.5.cls are not.
    """
    keys = itertools.groupby(range(len(members)), lambda at: _key(members[at].name))
    for key, run in keys:
        group = list(run)
        middles = (_stem(members[at].name).removeprefix(key) for at in group)
        images = sum(members[at].label is None for at in group)
        if images == 1 and not any(map(str.isdigit, "".join(middles))):
            yield group


def _pair(members: Sequence[Member], group: Sequence[int], labels: dict[int, Label]) -> None:
    """Gives the label of a group to its images, where it has both."""
    candidates = [members[at] for at in group if members[at].label is not None]
    # What holds nothing but a label counts before a field of JSON.
    candidates.sort(key=lambda member: suffix_of(member.name) == JSON)
    for at in group:
        if candidates and members[at].label is None:
            labels[at] = Label(candidates[0].label, candidates[0].problem)


def _pair_apart(members: Sequence[Member], labels: dict[int, Label]) -> None:
    """Pairs what lies apart, as where all images come first, by names that are there once."""
    times = Counter((_stem(member.name), member.label is None) for member in members)
    by_stem = {_stem(member.name): member for member in members if member.label is not None}
    for at, member in enumerate(members):
        stem = _stem(member.name)
        alone = times[stem, True] == times[stem, False] == 1
        if at not in labels and member.label is None and alone:
            labels[at] = Label(by_stem[stem].label, by_stem[stem].problem)


def numbered(texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes as numbers, and their names where they are no numbers of their own."""
    if all(_number(text) is not None for text in texts):
        return np.array([int(text) for text in texts], np.int64), ()
    names, labels = np.unique(texts, return_inverse=True)
    return labels.astype(np.int64), tuple(names.tolist())
