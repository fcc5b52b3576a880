"""Writes what PyTorch writes, opcode by opcode and without PyTorch, and so also what it never would."""

import struct
import zipfile

MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value):
    if -2**31 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def sequence(*items):
    return b"](" + b"".join(items) + b"e"


def mapping(items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(module, name, *arguments):
    return glob(module, name) + tup(*arguments) + b"R"


def storage(kind="Float", key="0", numel=6, module="torch", *rest):
    return tup(text("storage"), glob(module, f"{kind}Storage"), text(key), text("cpu"), whole(numel), *rest) + b"Q"


def tensor(shape=(2, 3), stride=(3, 1), offset=0, source=None):
    return call("torch._utils", "_rebuild_tensor_v2", storage() if source is None else source, whole(offset),
                tup(*map(whole, shape)), tup(*map(whole, stride)), b"\x89", call("collections", "OrderedDict"))


def parameter(data):
    return call("torch._utils", "_rebuild_parameter", data, b"\x88", call("collections", "OrderedDict"))


def module(name, attributes):
    """An object of a TorchScript class."""
    return glob("__torch__", name) + b")\x81" + mapping(attributes) + b"b"


def pickled(body):
    return b"\x80\x02" + body + b"."


def torch_zip(path, body, storages, *, order=b"little", method=zipfile.ZIP_STORED, extra=None):
    """`body` is a pickle's opcodes, or a whole pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", body if body[:1] == b"\x80" or body[-1:] == b"." else pickled(body))
        if order is not None:
            file.writestr("archive/byteorder", order)
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data, method)
        for name, data in (extra or {}).items():
            file.writestr(name, data)
    return path


def torch_legacy(path, body, storages, *, little=b"\x88", protocol=1001, itemsize=4):
    parts = [MAGIC, pickled(whole(protocol)), pickled(mapping({"little_endian": little})), pickled(body),
             pickled(sequence(*map(text, storages)))]
    parts += [struct.pack("<q", len(data) // itemsize) + data for data in storages.values()]
    path.write_bytes(b"".join(parts))
    return path
