"""The initialisers of an ONNX file, under the names that the exported modules had.

An exporter keeps the names of biases and norms, but transposes linear weights and numbers them;
such a weight is known only by the node that uses it, whose name is the module's path.
"""

from pathlib import Path

import numpy as np

from proteus_jax.errors import InputError

ANONYMOUS = "onnx::"


def read(path: Path) -> dict[str, np.ndarray]:
    """Every initialiser by module name; nothing of the graph is run and no second file is opened.

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
    return arrays
