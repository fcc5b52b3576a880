"""Read zip files, and the .npz files among them: entries at their offset, or inflated to their stated size."""

import io
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmm.pretrained.io.tensors import (
    BFLOAT16,
    MAX_NAME,
    MAX_TENSORS,
    FileError,
    Tensor,
    as_array,
    failure,
    read_bytes,
    shape_problem,
    short,
)

MAX_DIRECTORY = 8 * 2**20
"""Longest table of contents, in bytes: some 100 per entry, which takes Python about a second."""
MAX_RATIO = 1032
"""Highest compression of deflate; an entry that claims more lies about its size."""
NPY_HEADER = 16 * 2**10
"""Bytes of an .npy that are inflated to find its shape; numpy refuses headers over 10,000."""
CHUNK = 2**20


@dataclass(frozen=True)
class Entry:
    """A file in a zip, of `size` bytes of which `packed` are stored from `offset` on."""

    path: Path
    name: str
    offset: int
    size: int
    packed: int
    deflated: bool
    crc: int

    def read(self, count: int | None = None, start: int = 0) -> np.ndarray:
        """Return `count` bytes from `start` on, or all, which are checked against their CRC. Raises `FileError`."""
        count = self.size - start if count is None else count
        if self.deflated:
            data = self._inflate(start + count)[start:]
        else:
            data = read_bytes(self.path, self.offset + start, count)
        # PyTorch's set_crc32_options(False) leaves it 0
        if count == self.size and self.crc and zlib.crc32(data) != self.crc:
            raise failure(self.path, [f"{self.name} is damaged: its CRC is not the one it was written with"])
        return data

    def _inflate(self, count: int) -> np.ndarray:
        """Return the first `count` bytes; no more are ever inflated."""
        machine, data, at = zlib.decompressobj(-zlib.MAX_WBITS), bytearray(), 0
        try:
            while len(data) < count:
                packed = machine.unconsumed_tail
                if not packed and at == self.packed:
                    raise failure(self.path, [f"{self.name} inflates to {len(data):,} bytes; {count:,} were announced"])
                if not packed:
                    packed = read_bytes(self.path, self.offset + at, min(CHUNK, self.packed - at)).tobytes()
                    at += len(packed)
                data += machine.decompress(packed, min(CHUNK, count - len(data)))
        except zlib.error as error:
            raise failure(self.path, [f"{self.name} is damaged: {error}"]) from None
        return np.frombuffer(data, np.uint8)


class _Bounded(io.BufferedReader):
    """Stops zipfile from taking in a table of contents of any length."""

    def read(self, size=-1, /):
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of contents has {size:,} bytes; at most {MAX_DIRECTORY:,} are read")
        return super().read(size)


def entries(path: Path) -> dict[str, Entry]:
    """Return the files in a zip, by name. Raises `FileError` for repeated names and for entries no checkpoint has."""
    files: dict[str, Entry] = {}
    problems = []
    try:
        with _Bounded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            length = file.seek(0, io.SEEK_END)
            infos = archive.infolist()
            if len(infos) > MAX_TENSORS:
                raise failure(path, [f"it holds {len(infos):,} files; at most {MAX_TENSORS:,} are read"])
            for info in infos:
                entry = _entry(path, file, length, info)
                if isinstance(entry, str):
                    problems.append(f"{short(info.filename)} {entry}")
                elif info.filename in files:
                    problems.append(f"{short(info.filename)} is in it twice")
                else:
                    files[info.filename] = entry
    except FileError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError, OSError) as error:
        raise failure(path, [f"it is truncated or damaged: {str(error)[:200]}"]) from None
    if problems:
        raise failure(path, problems)
    return files


def _entry(path: Path, file: io.BufferedReader, length: int, info: zipfile.ZipInfo) -> Entry | str:
    """Find the bytes of an entry, or return the problem with it."""
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type}; stored and deflated ones are read"
    if not 0 <= info.header_offset <= length - 30:
        return "lies outside the file"
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        return "has no header where the table of contents says"
    offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if offset + info.compress_size > length:
        return f"ends after the file: {info.compress_size:,} bytes from {offset:,} on in {length:,}"
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if not deflated and info.file_size != info.compress_size:
        return f"is stored as {info.compress_size:,} bytes but claims {info.file_size:,}"
    if deflated and info.file_size > MAX_RATIO * max(info.compress_size, 1):
        return f"claims {info.file_size:,} bytes, which {info.compress_size:,} deflated ones cannot hold"
    return Entry(path, info.filename, offset, info.file_size, info.compress_size, deflated, info.CRC)


def open_npz(path: Path, files: dict[str, Entry]) -> dict[str, Tensor]:
    """Return the arrays of an .npz, by name. `|V2` is bfloat16, as JAX's users save it. Raises `FileError`."""
    tensors, problems = {}, []
    for name, entry in files.items():
        key = name.removesuffix(".npy")
        if key == name:
            problems.append(f"{short(name)} is no .npy")
        elif len(key) > MAX_NAME:
            problems.append(f"the name {short(key)} has {len(key):,} characters; at most {MAX_NAME} are read")
        else:
            tensor = _npy(entry)
            if isinstance(tensor, str):
                problems.append(f"{short(key)} {tensor}")
            else:
                tensors[key] = tensor
    if problems:
        raise failure(path, problems)
    return tensors


def _npy(entry: Entry) -> Tensor | str:
    """Return the array in one .npy after reading its header, or the problem with it."""
    stream = io.BytesIO(entry.read(min(NPY_HEADER, entry.size)).tobytes())
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            return f"is an .npy of version {version}; 1.0 and 2.0 are read"
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
    except Exception as error:  # damaged bytes make numpy's parser raise nearly anything
        return f"has a damaged header: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}"
    if dtype == np.dtype("V2"):
        dtype = BFLOAT16
    elif dtype.kind not in "biufc":
        kind = "Python objects, which would have to be unpickled" if dtype.hasobject else f"{short(str(dtype))}"
        return f"holds {kind}; numbers are read"
    problem = shape_problem(shape, dtype.itemsize)
    if problem:
        return f"is none: {problem}"
    start, count = stream.tell(), math.prod(shape) * dtype.itemsize
    if entry.size != start + count:
        return f"has {entry.size - start:,} bytes of data; {dtype}{list(shape)} needs {count:,}"
    native = dtype.newbyteorder("=")

    def read() -> np.ndarray:
        data = entry.read()[start:]
        # numpy pads headers to 64 bytes, others may not, and items have to be aligned
        array = as_array(data if start % 16 == 0 else data.copy(), dtype, shape[::-1] if fortran else shape)
        return np.asarray(array.T if fortran else array, native, order="C")

    return Tensor(tuple(shape), native, read)
