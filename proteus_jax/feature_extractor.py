"""A frozen backbone as a function of images."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from proteus_jax.data.decode import LazyImage, open_image
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.data.transforms.native_size import NativeSize
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.models.functional import BackboneFunction, Params, fastest_attention
from proteus_jax.models.vit import Features
from proteus_jax.runtime import remote_fs
from proteus_jax.weights.model_dir import ModelCard

# What `preprocess` takes: a path, the bytes of a file, pixels, or one of Pillow's images.
Picture = Any
NATIVE = "native"


def _as_picture(image: Picture) -> LazyImage:
    if isinstance(image, str | os.PathLike):
        return open_image(remote_fs.read("", os.path.expanduser(os.fspath(image))))  # noqa: PTH111
    if isinstance(image, bytes):
        return open_image(image)
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise Unreadable(f"expected uint8 [H, W, 3], found {array.dtype} {array.shape}")
    return open_image(array)


class Model:
    """A loaded backbone: images in, features out. It can be pickled and copied."""

    def __init__(self, params: Params, card: ModelCard, dtype: DTypeLike = jnp.float32):
        self.card = card
        self.spec = card.spec
        self.params = jax.device_put(params)
        self._of_layers: dict[int, Any] = {}
        self._backbone = BackboneFunction(card.spec, dtype, fastest_attention(card.spec, dtype))

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of matmuls."""
        return self._backbone.dtype

    def __repr__(self) -> str:
        return f"<proteus_jax model {self.spec}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # What is compiled stays with the process that compiled it.
        return Model, (jax.device_get(self.params), self.card, self._backbone.dtype)

    def __call__(self, images: np.ndarray | jax.Array) -> Features:
        """Class token [B, D], patch tokens [B, N, D] and registers [B, R, D], float32.

        Images are uint8 [B, H, W, 3]; H and W are multiples of the patch size. Compiled once a
        shape. InputError for anything else; `of_unit_range` takes floats.
        """
        self._refuse_floats(images)
        with _promoting():
            return self._features(self.params, images)

    def of_unit_range(self, images: np.ndarray | jax.Array) -> Features:
        """The same of float32 images [B, H, W, 3] with values from 0 to 1, with respect to which it
        can be differentiated. InputError for other shapes and values.
        """
        self._refuse_shape(images, "float")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images should be float32 from 0 to 1, found {images.dtype}")
        # Under a transformation there are no values to look at. Who follows a gradient may leave
        # the range; who forgets to divide by 255, or normalizes, is further away.
        if not isinstance(images, Tracer):
            least, most = float(images.min()), float(images.max())
            if not (least >= -1 and most <= 2):
                raise InputError(f"images should be from 0 to 1, found from {least} to {most}")
        with _promoting():
            return self._features_of_floats(self.params, images)

    def _refuse_floats(self, images: np.ndarray | jax.Array) -> None:
        self._refuse_shape(images, "uint8")
        if images.dtype != np.uint8:
            raise InputError(
                f"images should be uint8 [batch, height, width, 3], found {images.dtype} "
                f"{images.shape}; model.of_unit_range takes floats from 0 to 1"
            )

    def _refuse_shape(self, images: np.ndarray | jax.Array, dtype: str) -> None:
        shape = getattr(images, "shape", None)
        if shape is None or len(shape) != 4 or shape[-1] != 3:
            given = f"{getattr(images, 'dtype', type(images).__name__)} {shape or ''}"
            raise InputError(f"images should be {dtype} [batch, height, width, 3], found {given}")
        patch = self.spec.patch_size
        if shape[1] % patch or shape[2] % patch or 0 in shape:
            raise InputError(
                f"image sides should be multiples of {patch}, found {shape[1]} x {shape[2]}"
            )

    def layers(self, count: int) -> Callable[[np.ndarray | jax.Array], tuple[Features, ...]]:
        """A function of images, as in a call, to the features of the last `count` blocks, the last
        one last, each after the final LayerNorm: `model.layers(4)(images)`.

        InputError where the model has fewer blocks.
        """
        if not isinstance(count, int) or not 1 <= count <= self.spec.depth:
            raise InputError(
                f"layers: expected from 1 to the model's {self.spec.depth} blocks, found {count!r}"
            )
        if count not in self._of_layers:
            blocks = range(self.spec.depth - count, self.spec.depth)

            def features(params: Params, images: jax.Array) -> tuple[Features, ...]:
                pixels = self.card.normalization(images)
                return self._backbone.intermediates(params, pixels, blocks)

            self._of_layers[count] = jax.jit(features)

        def of_images(images: np.ndarray | jax.Array) -> tuple[Features, ...]:
            self._refuse_floats(images)
            with _promoting():
                return self._of_layers[count](self.params, images)

        return of_images

    def preprocess(
        self,
        images: Picture | Sequence[Picture],
        size: int | str = 224,
        resize: int | None = None,
    ) -> np.ndarray:
        """Pixels uint8 [B, H, W, 3] for a call, of one image or of several: paths, the bytes of
        files, arrays uint8 [H, W, 3], or Pillow's images.

        As evaluation does, the shorter side is resized to `resize` (size * 256 / 224) and the
        center square of `size` cut out. With size="native" each side is rounded to whole patches
        instead; all images must then come to one shape. InputError names each that cannot be read.
        """
        several = images if isinstance(images, list | tuple) else [images]
        view = self._view(size, resize)
        views, problems = [], []
        for number, image in enumerate(several):
            try:
                views.append(view(_as_picture(image)))
            except (Unreadable, OSError) as error:
                name = image if isinstance(image, str | os.PathLike) else f"image {number}"
                problems.append(f"{name}: {getattr(error, 'strerror', None) or error}")
        if problems or not views:
            raise InputError(problems or "preprocess: expected an image or more, found none")
        shapes = sorted({view.shape for view in views})
        if len(shapes) > 1:
            raise InputError(
                f"preprocess: expected images that come to one shape, found {shapes[0]} and "
                f"{shapes[1]}; give them one by one"
            )
        return np.stack(views)

    def _view(self, size: int | str, resize: int | None) -> CenterCrop | NativeSize:
        patch = self.spec.patch_size
        if size == NATIVE:
            return NativeSize(patch)
        if not isinstance(size, int) or size < patch or size % patch:
            raise InputError(
                f"size: expected {NATIVE!r} or a multiple of the patch size {patch}, found {size!r}"
            )
        shorter = round(size * 256 / 224) if resize is None else resize
        if shorter < size:
            raise InputError(f"resize: expected at least the size, {size}, found {resize}")
        return CenterCrop(shorter, size)

    def attention(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Attention of the class token in the last block, [B, heads, N]; images as in a call."""
        self._refuse_floats(images)
        with _promoting():
            return self._attention(self.params, images)

    @functools.cached_property
    def _attention(self):
        return jax.jit(
            lambda params, images: self._backbone.class_attention(
                params, self.card.normalization(images)
            )
        )

    @functools.cached_property
    def _features(self):
        def features(params: Params, images: jax.Array) -> Features:
            return self._backbone(params, self.card.normalization(images))

        return jax.jit(features)

    @functools.cached_property
    def _features_of_floats(self):
        def features(params: Params, images: jax.Array) -> Features:
            pixels = self.card.normalization.of_unit_range(images.astype(jnp.float32))
            return self._backbone(params, pixels)

        return jax.jit(features)


@contextlib.contextmanager
def _promoting() -> Iterator[None]:
    """Shapes and dtypes are promoted as NumPy does, whatever a caller has JAX refuse of its own
    code.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
