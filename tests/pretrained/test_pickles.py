"""PyTorch files that our own writer makes: what is read from good ones, and why bad ones are refused."""

import builtins
import os
import pickle
import random
import zipfile

import numpy as np
import pytest

from jaxmm.pretrained.io import pickles
from jaxmm.pretrained.io import torch as torch_files
from jaxmm.pretrained.io.files import FileError, open_tensors
from tests.pretrained.common import refused
from tests.pretrained.writers import (
    MAGIC,
    call,
    glob,
    mapping,
    module,
    parameter,
    pickled,
    sequence,
    storage,
    tensor,
    text,
    torch_legacy,
    torch_zip,
    tup,
    whole,
)

SIX = np.arange(6, dtype="<f4") + 0.5
WRITERS = pytest.mark.parametrize("write", [torch_zip, torch_legacy])


def arrays(path):
    result = {name: entry.read() for name, entry in open_tensors(path).items()}
    for name, entry in open_tensors(path).items():
        array = result[name]
        assert array.shape == entry.shape and array.dtype == entry.dtype
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
    return result


@WRITERS
def test_tensors_of_nested_containers(tmp_path, write):
    body = mapping({
        "w": tensor(), "step": whole(7), "none": b"N", "bytes": b"C\x01a", "turned": tensor((3, 2), (1, 3)),
        "column": tensor((2,), (3,), 1), "scalar": tensor((), (), 5), "none_of": tensor((0, 3), (3, 1)),
        "p": parameter(tensor((3,), (1,), 3)), "deep": mapping({"a": mapping({"b": tensor((1,), (9,), 2)})}),
        "list": sequence(tensor((1,), (1,)), whole(1)), "device": call("torch", "device", text("cpu")),
        "dtype": glob("torch", "float16"), "size": call("torch", "Size", tup(whole(2))),
    })
    tensors = arrays(write(tmp_path / "x.bin", body, {"0": SIX.tobytes()}))
    square = SIX.reshape(2, 3)
    wanted = {"w": square, "turned": square.T, "column": square[:, 1], "scalar": SIX[5], "none_of": square[:0],
              "p": SIX[3:], "deep.a.b": SIX[2:3], "list.0": SIX[:1]}
    assert list(tensors) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(tensors[name], array, strict=True)


@WRITERS
@pytest.mark.parametrize("kind, dtype", [
    ("Double", "f8"), ("Float", "f4"), ("Half", "f2"), ("BFloat16", "bfloat16"), ("Long", "i8"), ("Int", "i4"),
    ("Short", "i2"), ("Char", "i1"), ("Byte", "u1"), ("Bool", "?"), ("ComplexFloat", "c8")])
def test_dtypes(tmp_path, write, kind, dtype):
    values = np.array([1, 0, 1, 1, 0, 1]).astype(dtype)
    options = {"itemsize": values.itemsize} if write is torch_legacy else {}
    body = mapping({"x": tensor(source=storage(kind))})
    tensors = arrays(write(tmp_path / "x.pt", body, {"0": values.tobytes()}, **options))
    np.testing.assert_array_equal(tensors["x"], values.reshape(2, 3), strict=True)


def test_dtypes_that_only_untyped_storages_hold(tmp_path):
    values = np.array([0.5, -2, 448]).astype("float8_e4m3fn")
    source = storage("Untyped", "0", 3, "torch.storage")
    body = mapping({"x": call("torch._utils", "_rebuild_tensor_v3", source, whole(0), tup(whole(3)), tup(whole(1)),
                              b"\x89", call("collections", "OrderedDict"), glob("torch", "float8_e4m3fn"))})
    np.testing.assert_array_equal(arrays(torch_zip(tmp_path / "x", body, {"0": values.tobytes()}))["x"], values)


@WRITERS
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_weights_are_taken_out_of_what_a_training_script_saves(tmp_path, write, wrapper):
    body = mapping({"epoch": whole(3), "optimizer": mapping({"state": tensor()}), wrapper: mapping({"w": tensor()}),
                    "args": glob("argparse", "Namespace") + b")\x81" + mapping({"lr": whole(1)}) + b"b"})
    assert list(open_tensors(write(tmp_path / "x", body, {"0": SIX.tobytes()}))) == ["w"]


def test_which_weights_are_taken_when_there_are_several(tmp_path):
    body = mapping({"module": mapping({"a": tensor()}), "model": mapping({"b": tensor()}),
                    "state_dict": mapping({"of": whole(3)})})
    assert list(open_tensors(torch_zip(tmp_path / "x", body, {"0": SIX.tobytes()}))) == ["b"]


@pytest.mark.parametrize("names, wanted", [
    (("module.a", "module.b.module.c"), ["a", "b.module.c"]), (("module.a", "b"), ["module.a", "b"])])
def test_the_prefix_of_data_parallel_training(tmp_path, names, wanted):
    body = mapping({name: tensor() for name in names})
    assert list(open_tensors(torch_zip(tmp_path / "x", body, {"0": SIX.tobytes()}))) == wanted


def test_ordered_dicts_with_metadata_and_of_python_2(tmp_path):
    empty = call("collections", "OrderedDict")
    new = empty + b"(" + text("a") + tensor() + b"u" + mapping({"_metadata": empty}) + b"b"
    old = call("collections", "OrderedDict", sequence(b"](U\x01b" + tensor() + b"e"))
    body = mapping({"new": new, "old": old})
    assert list(open_tensors(torch_zip(tmp_path / "x", body, {"0": SIX.tobytes()}))) == ["new.a", "old.b"]


def test_torchscript_modules_are_walked_by_their_attributes(tmp_path):
    scalar = tensor((), (), 0, storage("Long", "1", 1))
    block = module("Block", {"weight": tensor(), "training": b"\x89"})
    body = module("CLIP", {
        "training": b"\x89", "input_resolution": scalar,
        "visual": module("Vision", {"proj": tensor((3,), (1,)), "heads": call(
            "torch.jit._pickle", "build_intlist", sequence(whole(1), whole(2)))}),
        "blocks": module("Sequential", {"0": block, "1": block})})
    files = {"archive/code/__torch__.py": b"import os; os.abort()", "archive/constants.pkl": pickled(tup())}
    tensors = arrays(torch_zip(tmp_path / "x", body, {"0": SIX.tobytes(), "1": np.int64(224).tobytes()}, extra=files))
    assert list(tensors) == ["input_resolution", "visual.proj", "blocks.0.weight", "blocks.1.weight"]
    np.testing.assert_array_equal(tensors["input_resolution"], np.array(224), strict=True)
    np.testing.assert_array_equal(tensors["blocks.1.weight"], SIX.reshape(2, 3))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("function", [os.system, os.mkdir, builtins.eval, builtins.exec])
def test_nothing_is_executed(tmp_path, function, where, protocol):
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    argument = {os.system: f"touch {canary}", os.mkdir: str(canary)}.get(function, f"open({str(canary)!r}, 'w')")
    evil = pickle.dumps({"w": Evil(function, argument)}, protocol)
    if where == "zip":
        torch_zip(path, evil, {})
    elif where == "legacy":
        path.write_bytes(MAGIC + pickled(whole(1001)) + pickled(mapping({"little_endian": b"\x88"})) + evil)
    else:
        path.write_bytes(evil)
    python2 = protocol < 3 and function in (eval, exec)
    module = "__builtin__" if python2 else function.__module__
    if protocol < 2 and where == "bare":
        refused(path, "begins with")  # older pickles have no first byte that tells them
    elif protocol == 0:
        refused(path, "opcode PUT")  # in text, which PyTorch never writes
    else:
        refused(path, f"the global '{module}.{function.__name__}'")
    assert not canary.exists()
    pickle.loads(evil)
    assert canary.exists()  # it sings where it can


@pytest.mark.parametrize("body, words", [
    (glob("posix", "system") + tup(text("true")) + b"R", "global 'posix.system'"),
    (b"(" + text("true") + b"iposix\nsystem\n", "global 'posix.system'"),
    (b"(" + glob("posix", "system") + text("true") + b"o", "global 'posix.system'"),
    (text("posix") + text("system") + b"\x93", "global 'posix.system'"),
    (text("torch.serialization") + text("os.system") + b"\x93", "global 'torch.serialization.os.system'"),
    (glob("torch", "load"), "global 'torch.load'"),
    (glob("torch.nn.modules.linear", "Linear"), "global 'torch.nn.modules.linear.Linear'"),
    (glob("torch._utils", "_rebuild_sparse_tensor"), "_rebuild_sparse_tensor"),
    (glob("collections", "OrderedDict.__class__"), "OrderedDict.__class__"),
    (glob("__torch__x", "A"), "__torch__x.A"),
    (b"\x82\x01", "EXT1"), (b"P1\n", "PERSID"), (b"I1\n", "INT"), (b"\x8b\x04\0\0\0\0\0\0\0", "LONG4"),
    (glob("torch", "FloatStorage") + b")R", "calls the global torch.FloatStorage"),
    (glob("torch", "FloatStorage") + b")\x81", "an object of the global torch.FloatStorage"),
    (glob("__torch__", "A") + b")R", "calls the global __torch__"),
    (glob("__torch__", "A") + tup(whole(1)) + b"\x81", "an object of the global __torch__"),
    (text("a") + tup(whole(1)) + b"R", "calls a str"),
    # setting attributes or items of what may be named
    (glob("torch._utils", "_rebuild_tensor_v2") + mapping({"__code__": b"N"}) + b"b", "sets the state of the global"),
    (glob("collections", "OrderedDict") + mapping({"__reduce__": b"N"}) + b"b", "sets the state of the global"),
    (tensor() + mapping({"storage": whole(1)}) + b"b", "sets the state of a view"),
    (tensor() + text("x") + whole(1) + b"s", "sets items of a view"),
    (module("A", {}) + text("x") + whole(1) + b"s", "sets items of a module"),
    (glob("torch", "Size") + whole(1) + b"a", "appends to the global torch.Size"),
    (call("torch._tensor", "_rebuild_from_type_v2", glob("torch", "device"), glob("torch", "Tensor"), tup(), b"N"),
     "made by the global torch.device"),
    (call("torch._utils", "_rebuild_parameter", text("x"), b"\x88", b"N"), "a parameter holds a str"),
    (tup(text("module"), text("A"), text("a.py"), text("import os")) + b"Q", "outside of it that is no storage"),
    (b"}" + tup(whole(1)) + whole(1) + b"s", "a tuple as a key"),
    (b"}" + whole(2**70) + whole(1) + b"s", "a whole number as a key"),
])
@WRITERS
def test_what_no_tensor_needs_is_refused_by_name(tmp_path, write, body, words):
    refused(write(tmp_path / "x", body, {"0": SIX.tobytes()}), words)


@pytest.mark.parametrize("body, words", [
    (tensor((2, 4), (4, 1)), "does not fit"), (tensor((2, 3), (3, 1), 1), "does not fit"),
    (tensor((2, 3), (4, 1)), "does not fit"), (tensor((2,), (2**62,)), "does not fit"),
    (tensor((7,), (0,)), "does not fit"), (tensor((10**9,), (0,)), "does not fit"),
    (tensor((2, 3), (3, -1)), "stride"), (tensor((2, 3), (3, 1), -1), "offset -1"),
    (tensor((-2, 3), (3, 1)), "shape"), (tensor((2**40, 2**40), (1, 1)), "overflows"),
    (tensor((2**63, 0), (1, 1)), "shape"), (tensor((0, 2**62, 2**62), (1, 1, 1)), "overflows"),
    (tensor((1,) * 33, (1,) * 33), "33 dimensions"), (tensor((2, 3), (3,)), "2 sizes and 1 strides"),
    (tensor(source=storage(numel=2**61)), "storage '0'"), (tensor(source=storage(numel=7)), "storage '0'"),
    (tensor(source=storage(numel=-1)), "claims -1 elements"), (tensor(source=storage(numel=2**63)), "elements"),
    (tensor(source=storage(key="../0")), "'../0'"), (tensor(source=text("x")), "lacks its storage"),
    (tensor(source=storage("Untyped", module="torch.storage")), "lacks its storage or its dtype"),
    (tensor(source=storage("Float", "0", 6, "torch", tup(text("1"), whole(0), whole(3)))), "a view of another storage"),
])
@WRITERS
def test_tensors_lie_inside_their_storages(tmp_path, write, body, words):
    path = write(tmp_path / "x", mapping({"w": body}), {"0": SIX.tobytes()})
    refused(path, *(() if "../0" in words and write is torch_legacy else (words,)))


@WRITERS
def test_one_storage_cannot_claim_two_sizes(tmp_path, write):
    body = mapping({"a": tensor(), "b": tensor((12,), (1,), source=storage(numel=12))})
    refused(write(tmp_path / "x", body, {"0": SIX.tobytes()}), "'b' claims a storage of 48 bytes that has 24")


def nested(levels, inside=b")"):
    """Tuples that hold the one before twice: a hash or a `repr` of the last takes 2^levels steps."""
    return inside + b"q\0" + b"h\0\x86q\0" * levels


@pytest.mark.parametrize("body, words", [
    (b"}" + nested(99) + b"Ns", "as a key"),
    (mapping({"w": call("torch._utils", "_rebuild_tensor_v2", storage(), whole(0), nested(99), nested(99))}), "shape"),
    (mapping({"w": nested(99)}), "nested more than 64 deep"), (mapping({"w": nested(40)}), "100,000 values"),
    (nested(99) + b"Q", "outside of it"), (nested(99) + b"NR", "calls a tuple"),
    (mapping({"w": nested(99) + b"b"}), "the state of a str"),
    (b"r\xff\xff\xff\xff", "damaged"), (b"Nr\xff\xff\xff\xff", "no named tensors"),
    (b"X\xff\xff\xff\xffabc", "damaged"), (b"\x8e" + b"\xff" * 7 + b"\x7fabc", "damaged"),
    (b"\x95" + b"\xff" * 8, "damaged"),
    (b"N0" * 300_000, "100,000 steps"),
    (b"N" * 200_000, "100,000 steps"),
    # copies of a long list, or of a long argument
    (b"](" + b"](NNe" * 10_000 + b"eq\0" + (glob("collections", "OrderedDict") + b"h\0\x85R0") * 10_000, "as a key"),
    (b"](" + b"](" + text("a") + b"Ne" + b"](X\1\0\0\0aNe" * 5_000 + b"eq\0"
     + (glob("collections", "OrderedDict") + b"h\0\x85R0") * 10_000, "100,000 steps"),
    (b"(" + b"N" * 50_000 + b"tq\0" + (glob("torch", "Size") + b"h\0R0") * 5_000, "damaged"),
    # the same long list along many ways, and the same long name
    (sequence(b"](" + b"N" * 50_000 + b"eq\0", b"h\0" * 40_000), "100,000 values"),
    (sequence(mapping({"n" * 2_000_000: b"]"}) + b"q\0", b"h\0" * 20_000), "no named tensors"),
    (mapping({"n" * 513: tensor()}), "at most 512 characters"),
    (mapping({"n" * 300: mapping({"m" * 300: tensor()})}), "at most 512 characters"),
    (b"}q\0X\1\0\0\0ah\0s", "nested more than 64 deep"),
    (module("A", {}) + b"q\0}" + text("a") + b"h\0s" + text("b") + b"h\0sb", "nested more than 64 deep"),
    (mapping({"a.b": tensor(), "a": mapping({"b": tensor()})}), "two tensors are called 'a.b'"),
    (b"}(" + whole(1) + tensor() + text("1") + tensor() + b"u", "two tensors are called '1'"),
    (b"}(" + text("a") + b"u", "damaged"), (b"0", "damaged"), (b"t", "damaged"), (b"NN", "damaged"), (b"(N", "damaged"),
    (tensor()[:-1], "damaged"), (tensor(), "no named tensors, only a view"),
], ids=lambda value: value[:20] if isinstance(value, str) else "")
def test_no_pickle_takes_long_or_much(tmp_path, monkeypatch, body, words):
    # a tenth of the real limits, as annotations checked at every call take their time
    monkeypatch.setattr(pickles, "MAX_STEPS", 100_000)
    monkeypatch.setattr(torch_files, "MAX_VISITS", 100_000)
    refused(torch_zip(tmp_path / "x", body, {"0": SIX.tobytes()}), words)


def test_a_pickle_of_any_length_is_not_read(tmp_path):
    path = torch_zip(tmp_path / "x", b"N" * (pickles.MAX_BYTES + 1), {})
    refused(path, f"data.pkl has {pickles.MAX_BYTES + 4:,} bytes")


@WRITERS
def test_random_damage_is_an_error_or_harmless(tmp_path, write):
    body = mapping({"w": tensor(), "m": module("A", {"p": parameter(tensor())})})
    path = write(tmp_path / "x", body, {"0": SIX.tobytes()})
    good, rng = path.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            arrays(path)
            outcomes.add("read")
        except FileError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@WRITERS
def test_truncated_files(tmp_path, write):
    path = write(tmp_path / "x", mapping({"w": tensor()}), {"0": SIX.tobytes()})
    good = path.read_bytes()
    for length in [*range(0, len(good), 7), len(good) - 1]:
        path.write_bytes(good[:length])
        refused(path)


def test_storages_of_a_zip(tmp_path):
    body, path = mapping({"w": tensor()}), tmp_path / "x"
    refused(torch_zip(path, body, {"0": bytes(24)}, method=zipfile.ZIP_DEFLATED), "storage '0' is compressed")
    refused(torch_zip(path, body, {}), "storage '0' is missing")
    refused(torch_zip(path, body, {"0": SIX.tobytes()}, order=b"big"), "byte order is b'big'")
    refused(torch_zip(path, body, {"0": SIX.tobytes()}, extra={"other/data.pkl": pickled(b"N")}), "2 data.pkl")
    torch_zip(path, body, {"0": SIX.tobytes()})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data.pkl", pickled(b"N"))
    refused(path, "'archive/data.pkl' is in it twice")


def test_a_flipped_bit_in_a_storage_is_found(tmp_path):
    path = torch_zip(tmp_path / "x", mapping({"w": tensor()}), {"0": SIX.tobytes()})
    data = bytearray(path.read_bytes())
    data[data.index(SIX.tobytes()) + 5] ^= 1
    path.write_bytes(data)
    refused(path, "archive/data/0 is damaged", read=True)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = torch_legacy(tmp_path / "x", mapping({"w": tensor()}), {"0": SIX.tobytes()})
    tensors = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FileError, match="changed since"):
        tensors["w"].read()


def test_headers_of_legacy_files(tmp_path):
    body, path = mapping({"w": tensor()}), tmp_path / "x"
    refused(torch_legacy(path, body, {"0": SIX.tobytes()}, little=b"\x89"), "byte order")
    refused(torch_legacy(path, body, {"0": SIX.tobytes()}, protocol=1000), "protocol is 1000")
    refused(torch_legacy(path, body, {"1": SIX.tobytes()}), "storages it lists")
    refused(torch_legacy(path, body, {"0": SIX.tobytes()}, itemsize=1), "storage '0' has 96 bytes; 24 are claimed")
    path.write_bytes(pickle.dumps({"w": [1, 2]}, 2))
    refused(path, "not one by torch.save")
    path.write_bytes(b"\x80\x02" + b"N0" * 1000 + b"N.")
    refused(path, "100 steps")
