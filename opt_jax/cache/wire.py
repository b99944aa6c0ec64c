"""The values of a `tf.train.Example`, found in place.

Parsing the protocol buffer would copy every value twice, which takes a quarter of the time of reading the
record. The layout: https://protobuf.dev/programming-guides/encoding, tensorflow/core/example/feature.proto.
"""

_FIRST, _SECOND = 0x0A, 0x12  # tags: field 1 or 2, of a length and so many bytes


def byte_values(record: bytes) -> dict[str, tuple[int, int]]:
    """Where in `record` the value of every feature is: {name: (start, stop)}.

    Every feature has to be a list of one value of bytes, as `opt_jax.cache.schema.serialize` writes them.
    Raises ValueError for anything else.
    """
    found = {}
    try:
        at, end = _field(record, 0, _FIRST)  # Example.features
        while at < end:
            entry, after = _field(record, at, _FIRST)  # Features.feature: an entry of the map
            name, name_end = _field(record, entry, _FIRST)
            feature, feature_end = _field(record, name_end, _SECOND)
            values, values_end = _field(record, feature, _FIRST)  # Feature.bytes_list
            start, stop = _field(record, values, _FIRST)  # BytesList.value
            if not stop == values_end == feature_end == after:
                raise ValueError(f"the feature at byte {at} of the record is not one value of bytes")
            found[record[name:name_end].decode()] = start, stop
            at = after
    except IndexError:
        raise ValueError("the record ends too early") from None
    if not at == end == len(record):
        raise ValueError(f"the record has {len(record)} bytes, its features {end}")
    return found


def _field(record: bytes, at: int, tag: int) -> tuple[int, int]:
    """(start, stop) of what the field at byte `at` holds."""
    if record[at] != tag:
        raise ValueError(f"byte {at} of the record is {record[at]:#x}, expected {tag:#x}")
    size, shift = 0, 0
    while True:
        at += 1
        size |= (record[at] & 0x7F) << shift
        shift += 7
        if record[at] < 0x80:
            return at + 1, at + 1 + size
