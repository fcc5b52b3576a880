"""Files by PyTorch itself: what we read is what it reads, bit for bit, and what it refuses to read is refused."""

import argparse
import collections
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from jaxmm.pretrained.io.files import FileError, Tensor, open_tensors, write_safetensors

pytestmark = pytest.mark.parity
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value, path, zipped, **options):
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def bits(array):
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def same(path, wanted):
    """The file holds these tensors under these names, to the bit."""
    tensors = open_tensors(path)
    assert list(tensors) == list(wanted)
    for name, tensor in wanted.items():
        array = tensors[name].read()
        assert array.shape == tensors[name].shape == tuple(tensor.shape)
        assert str(array.dtype) == str(tensors[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
        raw = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(bits(array), raw, err_msg=name)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2]


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_views(tmp_path, zipped, dtype):
    torch.manual_seed(0)
    base = torch.randint(0, 9, (4, 6, 5)).to(dtype)
    views = {"base": base, "scalar": base[1, 2, 3], "turned": base.permute(2, 0, 1), "part": base[1:3, ::2, 4],
             "empty": base[:0], "row": base[2], "one": base[:1, :1, :1].squeeze(0), "copy": base.clone()}
    same(save(views, tmp_path / "x", zipped), views)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers(tmp_path, zipped, protocol):
    shared = torch.randn(3, 2)
    noted = torch.randn(2)
    noted.note = "attributes of its own"
    values = collections.OrderedDict(
        a=torch.nn.Parameter(shared), b=shared, step=3, rate=0.5, text="x" * 300, nothing=None, noted=noted,
        parameter=torch.nn.Parameter(noted), deep={"x": {1: shared.t()}, "list": [shared, 3], "t": (1, shared)},
        args=argparse.Namespace(lr=1, betas=(0.9, 0.99)), size=torch.Size([1, 2]), kind=torch.float16,
        device=torch.device("cpu"), best=np.float64(0.5), more=np.float32(1), raw=b"\x00\xff")
    wanted = {"a": shared, "b": shared, "noted": noted, "parameter": noted, "deep.x.1": shared.t(),
              "deep.list.0": shared, "deep.t.1": shared}
    same(save(values, tmp_path / "x", zipped, pickle_protocol=protocol), wanted)


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln = torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, 2)
        parts = {"c_fc": torch.nn.Linear(width, 7), "c_proj": torch.nn.Linear(7, width)}
        self.mlp = torch.nn.Sequential(collections.OrderedDict(parts))

    def forward(self, x):
        return self.mlp(self.ln(x)) + self.attn(x, x, x, need_weights=False)[0]


class Tower(torch.nn.Module):
    """Made like OpenAI's CLIP: an nn.Sequential of blocks, bare parameters, whole numbers kept as buffers."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Parameter(torch.randn(6, 4))
        self.resblocks = torch.nn.Sequential(Block(6), Block(6))
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("input_resolution", torch.tensor(224))
        self.names, self.sizes, self.width = ["a", "b"], [1, 2], 6
        self.tied = self.resblocks[0].mlp

    def forward(self, x):
        return self.norm(self.resblocks(x) @ self.proj)


@FORMATS
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_state_dicts_with_an_optimizer(tmp_path, zipped, wrapper):
    model = torch.nn.DataParallel(Tower())
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = model.state_dict()
    content = state if wrapper is None else {"epoch": 3, "optimizer": optimizer.state_dict(), wrapper: state}
    wanted = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    same(save(content, tmp_path / "x", zipped), wanted)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("trace", [False, True])
def test_torchscript(tmp_path, trace, half):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Tower().eval()
        script = torch.jit.trace(model, torch.randn(3, 6)) if trace else torch.jit.script(model)
        script = script.half() if half else script
        torch.jit.save(script, tmp_path / "x")
        theirs = torch.jit.load(tmp_path / "x").state_dict()
    tensors = open_tensors(tmp_path / "x")
    assert {"proj", "resblocks.1.attn.in_proj_weight", "resblocks.0.mlp.c_fc.bias", "input_resolution"} <= set(tensors)
    same(tmp_path / "x", {name: theirs[name] for name in tensors})
    assert set(tensors) == set(theirs)
    assert tensors["proj"].dtype == (np.float16 if half else np.float32)
    np.testing.assert_array_equal(tensors["input_resolution"].read(), np.array(224), strict=True)


def test_without_crc(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        same(save({"a": torch.arange(9)}, tmp_path / "x", True), {"a": torch.arange(9)})
    finally:
        torch.serialization.set_crc32_options(True)


def test_what_we_write_is_read_by_torch(tmp_path):
    values = {"a": torch.randn(3, 4).to(torch.bfloat16), "b": torch.arange(3),
              "c": torch.randn(2).to(torch.float8_e5m2)}
    torch.save(values, tmp_path / "pt")
    write_safetensors(tmp_path / "st", open_tensors(tmp_path / "pt"))
    for name, tensor in safetensors.torch.load_file(tmp_path / "st").items():
        assert tensor.dtype == values[name].dtype
        assert torch.equal(tensor.view(torch.uint8), values[name].view(torch.uint8))
    safetensors.torch.save_file(values, tmp_path / "theirs")
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "st").read_bytes()
    same(tmp_path / "theirs", {name: values[name] for name in open_tensors(tmp_path / "theirs")})
    assert all(isinstance(entry, Tensor) for entry in open_tensors(tmp_path / "st").values())


@FORMATS
@pytest.mark.parametrize("value, words", [
    (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    (lambda: {"a": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
    (lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "_rebuild_qtensor"),
    (lambda: {"a": torch.zeros(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
    (lambda: {"a": torch.ones(2, dtype=torch.complex64).conj()}, "lazily conjugated"),
    (lambda: {"a": torch.zeros(1).expand(1000)}, "does not fit"),
    (lambda: torch.ones(3), "no named tensors"),
    (lambda: {"a": {1, 2}}, "EMPTY_SET"),
], ids=range(8))
def test_what_is_not_read(tmp_path, zipped, value, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(value(), tmp_path / "x", zipped, pickle_protocol=4 if words == "EMPTY_SET" else 2)
    with pytest.raises(FileError) as caught:
        open_tensors(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


@FORMATS
def test_truncation(tmp_path, zipped):
    path = save({"a": torch.arange(99), "b": torch.randn(3)}, tmp_path / "x", zipped)
    good = path.read_bytes()
    for length in range(0, len(good), 53):
        path.write_bytes(good[:length])
        with pytest.raises(FileError):
            open_tensors(path)


def test_a_compressed_storage_is_refused(tmp_path):
    """PyTorch inflates such a file; a bomb of this kind would be stored in a few bytes."""
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "good")
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
    with pytest.raises(FileError, match="compressed"):
        open_tensors(tmp_path / "x")
