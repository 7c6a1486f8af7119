"""Files beside images in their place: passed over, counted, and said."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from proteus_jax.data.image_formats import HAS_HEIF, suffix_of

# What desktops, notebooks and file servers leave behind in a folder of images, in lower case.
_CLUTTER = frozenset(
    ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "@recycle", "@recently-snapshot",
     "$recycle.bin", "system volume information", "lost+found", "ehthumbs.db")
)  # fmt: skip
# As many names of a kind are kept.
KEPT = 1000
_NO_SUFFIX = "no suffix"


def is_clutter(name: str) -> bool:
    """Returns True for the name of a file or folder that is hidden or no one's own: `.x`, `._x`,
    `@eaDir`, `__MACOSX`, `Thumbs.db` and the like.
    """
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _CLUTTER


def lies_in_clutter(path: str) -> bool:
    """Returns True where a part of a path below a root is clutter."""
    return any(map(is_clutter, PurePosixPath(path).parts))


class PassedOver(NamedTuple):
    """Files and folders of a place that are not taken for images.

    `suffixes` counts files of other kinds by suffix; `hidden` and `links` count what is never
    looked into; `no_images` are files with the name of an image and the content of none,
    `unreadable` folders without permission, `empty` folders right inside that hold no image,
    `unlabeled` images without a class where classes are asked for.
    """

    suffixes: Mapping[str, int] = {}
    hidden: int = 0
    links: int = 0
    no_images: Sequence[str] = ()
    unreadable: Sequence[str] = ()
    empty: Sequence[str] = ()
    unlabeled: Sequence[str] = ()

    @property
    def total(self) -> int:
        """The number of all that was passed over."""
        names = sum(len(getattr(self, kind)) for kind in _NAMED)
        return sum(self.suffixes.values()) + self.hidden + self.links + names

    def lines(self) -> Iterator[str]:
        """Words for each kind, of what there is."""
        if self.suffixes:
            counted = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{count} {suffix}" for suffix, count in counted[:8])
            rest = f" and {len(counted) - 8} kinds more" if len(counted) > 8 else ""
            files = _counted(sum(self.suffixes.values()), "file", "files")
            yield f"{files} of other kinds ({shown}{rest})"
            if not HAS_HEIF and {".heic", ".heif"} & self.suffixes.keys():
                yield 'HEIC is read where pillow-heif is installed: pip install "proteus_jax[heic]"'
        if self.hidden:
            yield _counted(self.hidden, "hidden file or folder", "hidden files or folders")
        if self.links:
            yield _counted(self.links, "link inside an archive", "links inside an archive")
        for kind, (one, several) in _NAMED.items():
            names = getattr(self, kind)
            if names:
                yield f"{_counted(len(names), one, several)}, as {names[0]}"

    def as_json(self) -> dict[str, Any]:
        """The same as JSON, for results.json and doctor.json; of names at most KEPT of a kind."""
        return {
            "suffixes": dict(sorted(self.suffixes.items())),
            "hidden": self.hidden,
            "links": self.links,
            **{kind: list(getattr(self, kind)[:KEPT]) for kind in _NAMED},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PassedOver":
        """Reads what `as_json` made."""
        names = {kind: tuple(values[kind]) for kind in _NAMED}
        return cls(values["suffixes"], values["hidden"], values["links"], **names)


# Words for each kind of which the names are kept: one, several.
_NAMED = {
    "no_images": (
        "file with the name of an image that is none",
        "files with the name of an image that are none",
    ),
    "unreadable": ("folder that cannot be read", "folders that cannot be read"),
    "empty": ("folder without an image", "folders without an image"),
    "unlabeled": ("image without a class", "images without a class"),
}


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


NOTHING = PassedOver()


def joined(parts: Iterable[PassedOver]) -> PassedOver:
    """Sums what was passed over in several places."""
    parts = list(parts)
    return PassedOver(
        dict(sum((Counter(part.suffixes) for part in parts), Counter())),
        sum(part.hidden for part in parts),
        sum(part.links for part in parts),
        *(tuple(name for part in parts for name in getattr(part, kind)) for kind in _NAMED),
    )


def kind_of(name: str) -> str:
    """The suffix under which a file is counted."""
    return suffix_of(name) or _NO_SUFFIX
