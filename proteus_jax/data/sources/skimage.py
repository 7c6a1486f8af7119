"""Nineteen photographs and scans out of scikit-image's wheel: a data set wherever there is a
package index.

The right-hand quarter of each is held out; training sees the left three quarters only.
"""

from pathlib import Path

from proteus_jax.data import decode
from proteus_jax.data.splits import Split, split_within
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs
from proteus_jax.runtime.download import Wheel, cache_folder, fetch_wheel_members
from proteus_jax.runtime.filesystem import atomic_directory, cache_directory

NAME = "scikit-image"
WHEEL = Wheel(
    package="scikit-image",
    version="0.26.0",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    platform="manylinux_2_28_x86_64",
    python_version="311",
)
FILES = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "retina.jpg", "brick.png", "camera.png", "coins.png", "grass.png",
    "gravel.png", "moon.png", "page.png", "clock_motion.png", "cell.png", "horse.png", "text.png",
)  # fmt: skip


def _folder() -> Path:
    return cache_directory() / "pictures"


def are_here() -> bool:
    """Returns True where the images have been fetched."""
    return all((_folder() / name).is_file() for name in FILES)


def obtain_pictures() -> Path:
    """The folder of the pictures in the cache, fetched where it is not there yet."""
    folder = _folder()
    if not are_here():
        cache_folder()
        with atomic_directory(folder, replace=True) as temporary:
            fetch_wheel_members(WHEEL, [f"skimage/data/{name}" for name in FILES], temporary)
    return folder


def open_pictures() -> Split:
    """Left three quarters to train on, right quarters held out."""
    folder = obtain_pictures()
    try:
        pictures = [decode.decode(remote_fs.read(str(folder), name)) for name in FILES]
    except Unreadable as error:
        raise InputError(
            f"{folder}: spoilt ({error}); remove the folder to fetch it again"
        ) from None
    return split_within(pictures, FILES)
