"""The initializers of an ONNX file, under the names that the exported modules had.

An exporter keeps the names of biases and norms, but transposes linear weights and numbers them;
such a weight is known only by the node that uses it, whose name is the module's path.
"""

import re
from pathlib import Path

import numpy as np

from proteus_jax.errors import InputError

ANONYMOUS = "onnx::"


def read(path: Path) -> dict[str, np.ndarray]:
    """Every initializer by module name; nothing of the graph is run and no second file is opened.

    A weight of the MatMul `/a/b/MatMul` becomes `a.b.weight`, transposed back to [outputs, inputs];
    an anonymous array of another node keeps the node's path. InputError where the file is no ONNX
    or keeps data elsewhere.
    """
    import google.protobuf.message
    import onnx
    import onnx.numpy_helper

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (google.protobuf.message.DecodeError, OSError) as error:
        raise InputError(f"{path}: not a readable ONNX file ({error})") from None
    external = [
        item.name for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL
    ]
    if external:
        raise InputError(
            f"{path}: its weights lie in another file; export it with the weights inside"
        )
    users = {name: node for node in graph.node for name in node.input}
    arrays: dict[str, np.ndarray] = {}
    for item in graph.initializer:
        array, name = onnx.numpy_helper.to_array(item), item.name
        if name.startswith(ANONYMOUS) and name in users:
            node = users[name]
            module = node.name.strip("/").replace("/", ".")
            name = module
            if node.op_type == "MatMul":
                name, array = module.removesuffix(".MatMul") + ".weight", array.T
        if name in arrays:
            raise InputError(f"{path}: two arrays for {name}")
        arrays[name] = array
    return _joined_position_table(arrays)


def _joined_position_table(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An exporter of transformers' models splits the position table into its class row and its
    patches, numbered where they are used: join them again.
    """
    rows = {
        name: array
        for name, array in arrays.items()
        if re.fullmatch(r"(.*\.)?embeddings\.(Concat|Reshape)(_\d+)?", name)
    }
    cls = [name for name, array in rows.items() if array.ndim == 3 and array.shape[1] == 1]
    patches = [name for name, array in rows.items() if array.ndim == 3 and array.shape[1] > 1]
    if len(cls) != 1 or len(patches) != 1:
        return arrays
    table = cls[0].rpartition(".")[0] + ".position_embeddings"
    if table in arrays:
        return arrays
    rest = {name: array for name, array in arrays.items() if name not in (cls[0], patches[0])}
    return rest | {table: np.concatenate([arrays[cls[0]], arrays[patches[0]]], axis=1)}
