"""Shared by the tests of checkpoint files."""

import time

import pytest

from jaxmm.pretrained.io.files import FileError, open_tensors


def refused(path, *words, read=False):
    start = time.thread_time()
    with pytest.raises(FileError) as caught:
        tensors = open_tensors(path)
        if read:
            for entry in tensors.values():
                entry.read()
    assert time.thread_time() - start < 3
    message = str(caught.value)
    assert str(path) in message and len(message) < 3000
    for word in words:
        assert word in message, message
