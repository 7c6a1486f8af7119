"""A ViT as an ONNX graph, its position table made for one image size.

Input `pixel_values`, float32 [batch, 3, height, width], normalized; outputs `class_token`
[batch, width], `patch_tokens` [batch, patches, width] and, where there are any, `registers`.
"""

from typing import Any

import numpy as np

from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.rope import rotation
from proteus_jax.weights.convert.name_maps import Arrays

OPSET = 17
# A protocol buffer cannot be longer.
LARGEST = 2**31


def model_of(
    spec: ViTSpec,
    arrays: Arrays,
    table: np.ndarray | None,
    sides: tuple[int, int],
    batch: int | None,
) -> Any:
    """The onnx.ModelProto of canonical arrays for images of a height and width; any batch where
    none is given. `table` is the position table for them. InputError where it is too large.
    """
    size = sum(array.nbytes for array in arrays.values())
    if size >= LARGEST:
        raise InputError(
            f"{size / 2**30:.1f} GiB of weights; an ONNX file holds at most 2: take another format"
        )
    return _Graph(spec, arrays, sides, batch).built(table)


class _Graph:
    """Nodes and constants as they come."""

    def __init__(self, spec: ViTSpec, arrays: Arrays, sides: tuple[int, int], batch: int | None):
        import onnx

        self.onnx, self.spec, self.arrays = onnx, spec, arrays
        self.sides, self.batch = sides, batch
        self.rows, self.columns = (side // spec.patch_size for side in sides)
        self.count = self.rows * self.columns
        self.length = spec.prefix + self.count
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.number = 0

    def built(self, table: np.ndarray | None) -> Any:
        """The whole model."""
        onnx, spec = self.onnx, self.spec
        tokens = self.embedded(table)
        for layer in range(spec.depth):
            tokens = self.block(tokens, f"blocks.{layer}.")
        outputs = self.outputs(tokens)
        helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
        batch = self.batch or "batch"
        inputs = [helper.make_tensor_value_info("pixel_values", float32, [batch, 3, *self.sides])]
        shapes = {
            "class_token": [batch, spec.width],
            "patch_tokens": [batch, self.count, spec.width],
            "registers": [batch, spec.registers, spec.width],
        }
        infos = [
            helper.make_tensor_value_info(name, float32, shapes[name])
            for name in self.named(outputs)
        ]
        graph = helper.make_graph(self.nodes, "vit", inputs, infos, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = 8
        model.producer_name = "proteus_jax"
        onnx.checker.check_model(model)
        return model

    def named(self, outputs: dict[str, str]) -> list[str]:
        for name, value in outputs.items():
            self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        return list(outputs)

    def outputs(self, tokens: str) -> dict[str, str]:
        """Writes the outputs as VisionTransformer makes its Features."""
        spec = self.spec
        if spec.final_norm == "tokens":
            tokens = self.norm(tokens, "norm")
        patches = self.cut(tokens, spec.prefix, self.length, axis=1)
        if spec.pooling == "token":
            cls = self.flat(self.cut(tokens, 0, 1, axis=1))
        elif spec.pooling == "mean":
            cls = self.node("ReduceMean", patches, axes=[1], keepdims=0)
        else:
            cls = self.pooled(patches)
        if spec.final_norm == "class":
            cls = self.norm(cls, "norm")
        outputs = {"class_token": cls, "patch_tokens": patches}
        if spec.registers:
            outputs["registers"] = self.cut(tokens, int(spec.class_token), spec.prefix, axis=1)
        return outputs

    def embedded(self, table: np.ndarray | None) -> str:
        spec, arrays = self.spec, self.arrays
        patch = spec.patch_size
        parts = ["pixel_values", self.constant(arrays["patch_embed.proj.weight"])]
        if spec.patch_bias:
            parts.append(self.constant(arrays["patch_embed.proj.bias"]))
        patches = self.node("Conv", *parts, kernel_shape=[patch, patch], strides=[patch, patch])
        patches = self.reshaped(patches, [0, spec.width, self.count])
        tokens = self.node("Transpose", patches, perm=[0, 2, 1])
        before = np.zeros((1, 0, spec.width), np.float32)
        if spec.class_token:
            before = arrays["cls_token"].reshape(1, 1, spec.width)
        if table is not None:
            tokens = self.node("Add", tokens, self.constant(table[:, spec.table_prefix :]))
            if spec.table_prefix:
                before = before + table[:, : spec.table_prefix]
        if spec.registers:
            before = np.concatenate([before, arrays["register_tokens"]], axis=1)
        if before.shape[1]:
            tokens = self.node("Concat", self.for_each(before), tokens, axis=1)
        return self.norm(tokens, "norm_pre") if spec.pre_norm else tokens

    def for_each(self, rows: np.ndarray) -> str:
        """[1, n, width] repeated for every image of the batch."""
        shape = self.node("Shape", "pixel_values")
        batch = self.cut(shape, 0, 1, axis=0)
        rest = self.constant(np.array(rows.shape[1:], np.int64))
        whole = self.node("Concat", batch, rest, axis=0)
        return self.node("Expand", self.constant(rows), whole)

    def block(self, tokens: str, name: str) -> str:
        attended = self.attention(self.norm(tokens, f"{name}norm1"), name)
        tokens = self.node("Add", tokens, attended)
        fed = self.feed_forward(self.norm(tokens, f"{name}norm2"), f"{name}mlp.", f"{name}ls2")
        return self.node("Add", tokens, fed)

    def attention(self, tokens: str, name: str) -> str:
        spec = self.spec
        channels = spec.width // spec.heads
        qkv = self.linear(tokens, f"{name}attn.qkv")
        qkv = self.reshaped(qkv, [0, self.length, 3, spec.heads, channels])
        qkv = self.node("Transpose", qkv, perm=[2, 0, 3, 1, 4])
        query, key, value = (
            self.node("Gather", qkv, self.constant(np.int64(part)), axis=0) for part in range(3)
        )
        if spec.positions == "rotary":
            query, key = self.turned(query), self.turned(key)
        mixed = self.mixed(query, key, value)
        mixed = self.node("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = self.reshaped(mixed, [0, self.length, spec.width])
        return self.linear(mixed, f"{name}attn.proj", f"{name}ls1")

    def mixed(self, query: str, key: str, value: str) -> str:
        """softmax(query key^T / sqrt(d)) value of [b, h, t, d]."""
        channels = self.spec.width // self.spec.heads
        query = self.node("Mul", query, self.constant(np.float32(channels**-0.5)))
        scores = self.node("MatMul", query, self.node("Transpose", key, perm=[0, 1, 3, 2]))
        return self.node("MatMul", self.node("Softmax", scores, axis=-1), value)

    def turned(self, heads: str) -> str:
        spec = self.spec
        channels = spec.width // spec.heads
        by = rotation((self.rows, self.columns), channels, spec.prefix)
        first = self.cut(heads, 0, channels // 2, axis=3)
        second = self.cut(heads, channels // 2, channels, axis=3)
        other = self.node("Concat", self.node("Neg", second), first, axis=3)
        return self.node(
            "Add",
            self.node("Mul", heads, self.constant(by.cosine)),
            self.node("Mul", other, self.constant(by.sine)),
        )

    def pooled(self, patches: str) -> str:
        """SigLIP's attention of one query."""
        spec, weights = self.spec, self.arrays
        channels, count = spec.width // spec.heads, self.count
        kernels = np.split(weights["pool.qkv.weight"], 3)
        biases = np.split(weights["pool.qkv.bias"], 3)
        query = weights["pool.probe"].reshape(1, spec.width) @ kernels[0].T + biases[0]
        query = query.reshape(1, 1, spec.heads, channels).transpose(0, 2, 1, 3)
        key, value = (
            self.node(
                "Transpose",
                self.reshaped(
                    self.times(patches, kernels[part], biases[part]),
                    [0, count, spec.heads, channels],
                ),
                perm=[0, 2, 1, 3],
            )
            for part in (1, 2)
        )
        mixed = self.mixed(self.constant(query.astype(np.float32)), key, value)
        mixed = self.reshaped(self.node("Transpose", mixed, perm=[0, 2, 1, 3]), [0, spec.width])
        pooled = self.linear(mixed, "pool.proj")
        return self.node(
            "Add", pooled, self.feed_forward(self.norm(pooled, "pool.norm"), "pool.mlp.", "")
        )

    def feed_forward(self, tokens: str, name: str, scale: str) -> str:
        if self.spec.feed_forward == "swiglu" and not name.startswith("pool"):
            both = self.linear(tokens, f"{name}w12")
            gate = self.cut(both, 0, self.spec.hidden, axis=2)
            value = self.cut(both, self.spec.hidden, 2 * self.spec.hidden, axis=2)
            gate = self.node("Mul", gate, self.node("Sigmoid", gate))
            return self.linear(self.node("Mul", gate, value), f"{name}w3", scale)
        inside = self.activated(self.linear(tokens, f"{name}fc1"))
        return self.linear(inside, f"{name}fc2", scale)

    def activated(self, x: str) -> str:
        number = lambda value: self.constant(np.float32(value))  # noqa: E731
        if self.spec.activation == "quick_gelu":
            return self.node("Mul", x, self.node("Sigmoid", self.node("Mul", x, number(1.702))))
        if self.spec.activation == "gelu":
            bent = self.node("Erf", self.node("Mul", x, number(2**-0.5)))
        else:
            cube = self.node("Mul", self.node("Mul", x, x), x)
            inner = self.node("Add", x, self.node("Mul", cube, number(0.044715)))
            bent = self.node("Tanh", self.node("Mul", inner, number((2 / np.pi) ** 0.5)))
        return self.node(
            "Mul", self.node("Mul", x, number(0.5)), self.node("Add", bent, number(1.0))
        )

    def norm(self, tokens: str, name: str) -> str:
        scale, bias = (self.constant(self.arrays[f"{name}.{part}"]) for part in ("weight", "bias"))
        epsilon = self.spec.norm_epsilon
        return self.node("LayerNormalization", tokens, scale, bias, axis=-1, epsilon=epsilon)

    def linear(self, tokens: str, name: str, scale: str = "") -> str:
        """Writes a Linear with a LayerScale's factors in its weights."""
        weight, bias = self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]
        gamma = self.arrays.get(f"{scale}.gamma")
        if gamma is not None:
            weight, bias = weight * gamma[:, None], bias * gamma
        return self.times(tokens, weight, bias)

    def times(self, tokens: str, weight: np.ndarray, bias: np.ndarray) -> str:
        product = self.node("MatMul", tokens, self.constant(np.ascontiguousarray(weight.T)))
        return self.node("Add", product, self.constant(bias))

    def cut(self, value: str, start: int, stop: int, *, axis: int) -> str:
        ends = (self.constant(np.array([number], np.int64)) for number in (start, stop, axis))
        return self.node("Slice", value, *ends)

    def flat(self, value: str) -> str:
        return self.reshaped(value, [0, self.spec.width])

    def reshaped(self, value: str, shape: list[int]) -> str:
        return self.node("Reshape", value, self.constant(np.array(shape, np.int64)))

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self.number += 1
        name = f"{kind}_{self.number}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name
