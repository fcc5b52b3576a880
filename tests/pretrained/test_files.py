"""Safetensors, sharded indices and .npz: what is written and read back, and why bad ones are refused."""

import inspect
import io
import json
import os
import struct
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxmm.pretrained.io import zips
from jaxmm.pretrained.io.files import DTYPES, FileError, Tensor, file_metadata, open_tensors, write_safetensors
from jaxmm.pretrained.io.tensors import MAX_TENSORS
from tests.pretrained.common import refused
from tests.pretrained.writers import mapping, tensor, torch_legacy, torch_zip

RNG = np.random.default_rng(0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def arrays(path):
    result = {}
    for name, entry in open_tensors(path).items():
        array = result[name] = entry.read()
        assert array.shape == entry.shape and array.dtype == entry.dtype and array.nbytes == entry.nbytes
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
        assert not np.shares_memory(array, entry.read())
    return result


def same(tensors, wanted):
    assert sorted(tensors) == sorted(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(tensors[name], array, strict=True)


def lazy(values):
    return {name: Tensor(array.shape, array.dtype, lambda array=array: array) for name, array in values.items()}


def some():
    return {
        "w": RNG.standard_normal((2, 3)).astype("f4"), "bf16": RNG.standard_normal((5, 1)).astype(BFLOAT16),
        "half": RNG.standard_normal(7).astype("f2"), "yes": np.array([True, False, True]), "é/ünïcode": np.arange(3),
        "scalar": np.array(2.5), "nothing": np.zeros((0, 4), "f4"), "byte": np.arange(3, dtype=np.uint8),
        "f8": np.array([1, -2]).astype(ml_dtypes.float8_e4m3fn), "complex": np.array([1 + 2j], "c8"),
    }


def raw(path, header, data=b"", size=None):
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def info(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_safetensors_by_the_library(tmp_path):
    path, values = tmp_path / "x", some()
    safetensors.numpy.save_file(values, path, {"format": "np"})
    same(arrays(path), values)
    assert file_metadata(path) == {"format": "np"}


def test_what_is_written_is_what_the_library_writes(tmp_path):
    ours, theirs, values = tmp_path / "ours", tmp_path / "theirs", some()
    del values["f8"]  # the library writes these for numpy but does not read them
    values["turned"] = RNG.standard_normal((3, 4)).T  # not contiguous
    write_safetensors(ours, lazy(values), {"format": "np"})
    copies = {name: np.copy(array, order="C") for name, array in values.items()}
    safetensors.numpy.save_file(copies, theirs, {"format": "np"})
    assert ours.read_bytes() == theirs.read_bytes()
    same(safetensors.numpy.load_file(ours), values)
    same(arrays(ours), values)
    write_safetensors(ours, {})
    assert arrays(ours) == {} and file_metadata(ours) == {}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_goes_there_and_back(tmp_path, dtype):
    values = {"a": np.ones(3).astype(dtype), "b": np.full((2, 1), 2).astype(dtype)}
    write_safetensors(tmp_path / "x", lazy(values))
    same(arrays(tmp_path / "x"), values)
    assert (tmp_path / "x").read_bytes() == safetensors.numpy.save(values)


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    size = 2**22
    values = {str(i): Tensor((size,), np.dtype(np.uint8), lambda: np.ones(size, np.uint8)) for i in range(8)}
    tracemalloc.start()
    try:
        write_safetensors(tmp_path / "x", values)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
        tracemalloc.reset_peak()
        for entry in open_tensors(tmp_path / "x").values():
            entry.read()
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()


def test_writing_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    write_safetensors(path, lazy({"a": np.ones(3)}))

    def fails():
        raise OSError("the disk has gone")

    with pytest.raises(OSError, match="gone"):
        write_safetensors(path, lazy({"a": np.ones(3)}) | {"b": Tensor((1,), np.dtype("f4"), fails)})
    with pytest.raises(FileError, match=r"a is float64\[3\], not float64\[4\] as announced"):
        write_safetensors(path, {"a": Tensor((4,), np.dtype("f8"), lambda: np.ones(3))})
    assert os.listdir(tmp_path) == ["x"]
    same(arrays(path), {"a": np.ones(3)})


def test_what_safetensors_cannot_hold(tmp_path):
    values = lazy({"a": np.ones(1, "c16"), "b": np.ones(1, ">f4"), "__metadata__": np.ones(1), "\ud800": np.ones(1)})
    with pytest.raises(FileError) as caught:
        inspect.unwrap(write_safetensors)(tmp_path / "x", values, {"step": 3})  # as annotations are checked here only
    for word in ("'a' is complex128", "'b' is >f4", "called '__metadata__'", r"called '\ud800'", "metadata 'step'"):
        assert word in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("header, data, words", [
    ({"a": info(0, 4), "b": info(2, 6)}, 6, "header is wrong"),  # overlap
    ({"a": info(0, 4), "b": info(8, 12)}, 12, "header is wrong"),  # hole
    ({"a": info(0, 4)}, 3, "header is wrong"), ({"a": info(0, 4)}, 8, "header is wrong"),
    ({"a": info(0, 8)}, 8, "header is wrong"), ({"a": info(4, 0)}, 4, "header is wrong"),
    ({"a": info(0, 2**63)}, 4, "header is wrong"), ({"a": info(-4, 0)}, 4, "header is wrong"),
    ({"a": info(0, 4, (2**40, 2**40))}, 4, "header is wrong"), ({"a": info(0, 4, (2**62, 4))}, 4, "header is wrong"),
    ({"a": info(0, 4, (-1,))}, 4, "header is wrong"), ({"a": info(0, 4, (1,), "F33")}, 4, "header is wrong"),
    ({"a": info(0, 0, (0, 2**62, 2**62))}, 0, ""), ({"a": info(0, 4, (1,) * 33)}, 4, "33 dimensions"),
    ({"a": info(0, 1, (2,), "F4")}, 1, "F4', which is not read"), ({"a": 3}, 0, "header is wrong"),
    ({"n" * 513: info(0, 4)}, 4, "513 characters"), ({"__metadata__": {"a": 1}}, 0, "header is wrong"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4,
     "header is wrong"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8,
     "header is wrong"),
    (b"{" * 100_000, 0, "header is wrong"), (b'{"a":' * 100_000, 0, "header is wrong"), (b"{}{}", 0, "header is wrong"),
    (b'{"\xff":1}', 0, "header is wrong"),
], ids=lambda value: value[:16] if isinstance(value, str) else "")
def test_bad_safetensors(tmp_path, header, data, words):
    refused(raw(tmp_path / "x", header, bytes(data)), words)


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**40, 10**8])
def test_headers_that_claim_to_be_long(tmp_path, size):
    tracemalloc.start()
    try:
        refused(raw(tmp_path / "x", b"{}", size=size), f"header claims {size:,} bytes")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_more_tensors_than_any_checkpoint_has(tmp_path):
    path = raw(tmp_path / "x", {f"t{i}": info(0, 0, (0,)) for i in range(MAX_TENSORS + 1)})
    refused(path, "100,001 tensors")


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "x"
    safetensors.numpy.save_file(some(), path)
    good = path.read_bytes()
    for length in (0, 1, 8, 9, 20, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        refused(path)


@pytest.mark.parametrize("data, words", [
    (b"", "it is empty"), (b"<html>", "begins with b'<html>'"),
    (b"\x89HDF\r\n\x1a\n" + bytes(50), "begins with b'\\x89HDF"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "it is a git-lfs pointer"),
])
def test_other_files(tmp_path, data, words):
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path / "model.safetensors", words)


def test_places_without_a_file(tmp_path):
    refused(tmp_path, "is a folder")
    refused(tmp_path / "x", "No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no ordinary file")
    with pytest.raises(FileError, match="No such file"):
        file_metadata(tmp_path / "x")


def index(folder, names, **more):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names} | more))
    return folder / "model.safetensors.index.json"


def test_shards_of_any_kind(tmp_path):
    values = {"a": np.ones(3, "f4"), "b": np.zeros((2, 2), BFLOAT16)}
    safetensors.numpy.save_file(values | {"unnamed": np.ones(1)}, tmp_path / "1")
    six = np.arange(6, dtype="f4")
    torch_zip(tmp_path / "2", mapping({"c": tensor()}), {"0": six.tobytes()})
    torch_legacy(tmp_path / "3", mapping({"d": tensor()}), {"0": six.tobytes()})
    path = index(tmp_path, {"a": "1", "c": "2", "b": "1", "d": "3"})
    same(arrays(path), values | {"c": six.reshape(2, 3), "d": six.reshape(2, 3)})
    assert list(open_tensors(path)) == ["a", "c", "b", "d"] and file_metadata(path) == {}


def test_the_prefix_of_data_parallel_training_in_shards(tmp_path):
    safetensors.numpy.save_file({"module.a": np.ones(3)}, tmp_path / "1")
    safetensors.numpy.save_file({"module.b": np.ones(3)}, tmp_path / "2")
    assert list(open_tensors(index(tmp_path, {"module.a": "1", "module.b": "2"}))) == ["a", "b"]


def test_everything_wrong_with_shards_is_told_at_once(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "1")
    (tmp_path / "broken").write_bytes(b"PK\x03\x04")
    names = {"a": "1", "b": "1", "c": "gone", "d": "broken", "e": "model.safetensors.index.json", "f": "\ud800"}
    refused(index(tmp_path, names), "'b' is not in 1", "shard 'gone': No such file", "broken cannot be read",
            "is an index itself", r"'\ud800' is not the name")


@pytest.mark.parametrize("shard", ["../x", "/etc/passwd", "..", ".", "", "a/b", "..\\x", "C:x", "x\0", "./x"])
def test_shards_lie_beside_the_index(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "x")
    safetensors.numpy.save_file({"a": np.ones(3)}, folder / "x")
    refused(index(folder, {"a": shard}), "is not the name of a file beside it")


@pytest.mark.parametrize("text, words", [
    ("{", "no JSON"), ('{"a": 1}', "no weight_map"), ('{"weight_map": [1]}', "no weight_map"),
    ('{"weight_map": {"a": 1}}', "no weight_map"), ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is in it twice"),
    ('{"weight_map":' * 100_000, "no JSON"), ('{"weight_map": {}, "x": ' + "9" * 9999 + "}", "no JSON"),
])
def test_bad_indices(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    refused(tmp_path / "x.json", words)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    values = {
        "params/cls": RNG.standard_normal((2, 3)).astype("f4"), "complex": np.array([1j], "c8"),
        "fortran": np.asfortranarray(RNG.standard_normal((3, 4, 2))), "big": np.arange(4, dtype=">i2"),
        "scalar": np.array(3), "yes": np.array([True, False]), "half": np.ones(3, "f2"),
        "nothing": np.zeros((0, 3)), "long": RNG.integers(0, 9, 700_000),
    }
    bfloat16 = RNG.standard_normal((3, 5)).astype(BFLOAT16)
    save(tmp_path / "x.npz", **values, bf16=bfloat16.view("V2"), turned=np.asfortranarray(bfloat16.view("V2")))
    wanted = values | {"big": np.arange(4, dtype="i2"), "bf16": bfloat16, "turned": bfloat16}
    same(arrays(tmp_path / "x.npz"), wanted)
    assert file_metadata(tmp_path / "x.npz") == {}


def npy(descr="<f4", shape=(2,), fortran=False, data=b"\0" * 8, header=None, version=1):
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}) if header is None else header
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode() + data


def zipped(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_headers_of_any_length(tmp_path, version):
    """Others than numpy may not pad to where items are aligned."""
    data = np.array([1, 2], "f4")
    same(arrays(zipped(tmp_path / "x", {"a.npy": npy(data=data.tobytes(), version=version)})), {"a": data})


@pytest.mark.parametrize("data, words", [
    (npy("|O"), "Python objects"), (npy([("a", "|O")]), "Python objects"), (npy([("a", "<f4")]), "numbers are read"),
    (npy("<U1"), "numbers are read"), (npy("|S4"), "numbers are read"), (npy("|V4"), "numbers are read"),
    (npy("<M8[s]"), "numbers are read"), (npy(shape=(3,)), "has 8 bytes of data"),
    (npy(shape=()), "has 8 bytes of data"),
    (npy(shape=(-2,)), "shape"), (npy(shape=(2**62, 2**62)), "overflows"), (npy(shape=(True, 2)), "shape"),
    (npy(shape=(10**12,)), "needs 4,000,000,000,000"), (npy(shape=(1,) * 33), "33 dimensions"),
    (npy(header="__import__('os').abort()"), "damaged header"), (npy(header="(" * 5000), "damaged header"),
    (npy(header="{'descr': '<f4', 'fortran_order': 3, 'shape': (2,)}"), "damaged header"),
    (npy(header="{}"), "damaged header"), (npy(header="9" * 9999), "damaged header"), (npy()[:20], "damaged header"),
    (npy(header=" " * 20_000, version=2), "damaged header"), (npy(version=3), "version (3, 0)"),
    (b"", "damaged header"),
    (b"cposix\nsystem\n(S'true'\ntR.", "damaged header"), (b"\x93NUMPY\x02\0\xff\xff\xff\xff", "damaged header"),
    (npy("(1000000000,)<f4"), ""),
], ids=range(26))
def test_bad_npz(tmp_path, data, words):
    refused(zipped(tmp_path / "x", {"a.npy": data}), words)


def test_object_arrays_by_numpy_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}, os], dtype=object)[:1], b=np.array([None]), c=np.ones(2))
    refused(tmp_path / "x.npz", "'a' holds Python objects", "'b' holds Python objects")


def test_a_bomb_is_not_inflated(tmp_path):
    """A gigabyte of zeros behind a header that wants eight bytes, and one that the zip hides."""
    machine = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = machine.compress(npy()) + b"".join(machine.compress(bytes(2**24)) for _ in range(16)) + machine.flush()
    path = zipped(tmp_path / "x", {"a.npy": packed}, zipfile.ZIP_STORED)
    good = path.read_bytes()
    where = good.rindex(b"PK\x01\x02")

    def claiming(size):
        data = bytearray(good)
        data[where + 10:where + 12] = struct.pack("<H", 8)
        data[where + 16:where + 28] = struct.pack("<III", 1, len(packed), size)
        path.write_bytes(data)
        return path

    tracemalloc.start()
    try:
        refused(claiming(len(npy()) + 2**28), "has 268,435,464 bytes of data; float32[2] needs 8")
        refused(claiming(2**31), "deflated ones cannot hold")
        # it claims what the header wants: that much is inflated, and found to be something else
        refused(claiming(len(npy())), "a.npy is damaged", read=True)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_an_entry_shorter_than_it_claims(tmp_path):
    path = zipped(tmp_path / "x", {"a.npy": npy(shape=(1000,), data=bytes(4000))})
    data = bytearray(path.read_bytes())
    where = data.rindex(b"PK\x01\x02")
    size = struct.unpack_from("<I", data, where + 24)[0]
    longer = npy(shape=(2000,), data=b"")
    machine = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = machine.compress(longer + bytes(4000)) + machine.flush()
    path = zipped(path, {"a.npy": packed}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    where = data.rindex(b"PK\x01\x02")
    data[where + 10:where + 12] = struct.pack("<H", 8)
    data[where + 24:where + 28] = struct.pack("<I", size + 4000)
    path.write_bytes(data)
    refused(path, "inflates to", "were announced", read=True)


def damaged(path, signature, at, value, form="<I"):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.rindex(signature) + at, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("signature, at, value, form, words", [
    (b"PK\x01\x02", 42, 2**31, "<I", "lies outside the file"), (b"PK\x01\x02", 42, 3, "<I", "no header where"),
    (b"PK\x01\x02", 20, 2**31, "<I", "ends after the file"), (b"PK\x01\x02", 24, 2**31, "<I", "but claims"),
    (b"PK\x01\x02", 8, 1, "<H", "is encrypted"), (b"PK\x01\x02", 10, 14, "<H", "compressed by method 14"),
    (b"PK\x05\x06", 12, 2**31, "<I", "truncated or damaged"), (b"PK\x05\x06", 16, 2**31, "<I", "outside the file"),
    (b"PK\x03\x04", 26, 60_000, "<H", "ends after the file"),
])
def test_bad_zips(tmp_path, signature, at, value, form, words):
    path = zipped(tmp_path / "x", {"a.npy": npy()}, zipfile.ZIP_STORED)
    refused(damaged(path, signature, at, value, form), words)


def test_names_in_npz(tmp_path):
    refused(zipped(tmp_path / "x", {"a.npy": npy(), "b.txt": b"x"}), "'b.txt' is no .npy")
    refused(zipped(tmp_path / "x", {"n" * 513 + ".npy": npy()}), "513 characters")
    path = zipped(tmp_path / "x", {"a.npy": npy()})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("a.npy", npy())
    refused(path, "'a.npy' is in it twice")


def test_long_tables_of_contents_are_not_read(tmp_path, monkeypatch):
    path = zipped(tmp_path / "x", {f"{i}.npy": npy() for i in range(100)})
    monkeypatch.setattr(zips, "MAX_TENSORS", 99)
    refused(path, "100 files")
    monkeypatch.setattr(zips, "MAX_DIRECTORY", 1000)
    refused(path, "table of contents has")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_an_array_is_found(tmp_path, method):
    path = zipped(tmp_path / "x", {"a.npy": npy(shape=(50,), data=RNG.bytes(200))}, method)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") - 20] ^= 4
    path.write_bytes(data)
    refused(path, "a.npy", read=True)


def test_truncated_npz(tmp_path):
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(3), b=np.zeros(5))
    good = stream.getvalue()
    for length in [*range(0, len(good), 17), len(good) - 1]:
        (tmp_path / "x").write_bytes(good[:length])
        refused(tmp_path / "x")
