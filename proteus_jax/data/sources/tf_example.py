"""Messages of TensorFlow's tf.train.Example, without TensorFlow."""

from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "proteus_jax.example"
_LISTS = {
    "bytes_list": ("BytesList", "TYPE_BYTES"),
    "float_list": ("FloatList", "TYPE_FLOAT"),
    "int64_list": ("Int64List", "TYPE_INT64"),
}


def _example() -> Any:
    """The message class: Example {features {feature: map of name to Feature}}, as in TensorFlow's
    feature.proto and example.proto.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="proteus_jax_example.proto", package=_PACKAGE, syntax="proto3"
    )

    def holds(message: Any, name: str, number: int, kind: str, **more: Any) -> None:
        """Adds a field that is a message."""
        options = {"label": field.LABEL_OPTIONAL, "type": field.TYPE_MESSAGE} | more
        message.field.add(name=name, number=number, type_name=f".{_PACKAGE}.{kind}", **options)

    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, (kind, of)) in enumerate(_LISTS.items(), 1):
        message = file.message_type.add(name=kind)
        value = {"name": "value", "number": 1, "label": field.LABEL_REPEATED}
        message.field.add(**value, type=getattr(field, of))
        holds(feature, name, number, kind, oneof_index=0)
    file.message_type.append(feature)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    holds(entry, "value", 2, "Feature")
    holds(features, "feature", 1, "Features.FeatureEntry", label=field.LABEL_REPEATED)
    holds(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


Example = _example()


def values_of(record: bytes, name: str) -> Sequence[Any]:
    """Returns the values of a feature of a serialized Example; none where it has no such feature.
    ValueError where the record is no Example.
    """
    try:
        features = Example.FromString(record).features.feature
    except Exception as error:
        # The message class raises an error of its library.
        raise ValueError(f"no tf.train.Example: {error}") from None
    if name not in features:
        return ()
    kind = features[name].WhichOneof("kind")
    return () if kind is None else list(getattr(features[name], kind).value)
