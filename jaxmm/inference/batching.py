"""Run a compiled function over batches on a mesh; decode ahead of it, and pad what it takes."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmm import hosts
from jaxmm.compiling import compile_prediction
from jaxmm.sharding import put_global
from jaxmm.task import Batch, Params, Task

INPUTS = ("image", "tokens", "prompt", "row", "image_tokens", "kept")
"""Keys of a batch that compiled functions may read; the rest stays on the host."""


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(a for a in ("data", "fsdp") if a in mesh.axis_names)


def padded_batch_size(batch_size: int, mesh: Mesh | None) -> int:
    """Return `batch_size` rounded up to a multiple of the devices that share a batch."""
    parts = math.prod(mesh.shape[a] for a in _batch_axes(mesh)) if mesh is not None else 1
    return -(-batch_size // parts) * parts


def predictions(task: Task) -> dict[str, Callable[[Params, Batch], jax.Array]]:
    """Return what `task` computes for each example, by name: pure functions.

    The names are `image`, `text`, `features`, `layers` and `logits`.
    """
    embedder, classifier = task.embedder, task.classifier
    functions = {} if embedder is None else {"image": embedder.image, "text": embedder.text,
                                             "features": embedder.features, "layers": embedder.layers}
    if classifier is not None:
        functions["logits"] = classifier.logits
    return {name: function for name, function in functions.items() if function is not None}


@lru_cache(maxsize=32)
def predict_fn(task: Task, names: tuple[str, ...], mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return `predictions(task)[name]` for each of `names`, compiled together.

    Equal arguments return the same function, so that a later evaluation need not compile it again. Its outputs are
    replicated on every host.
    """
    functions = predictions(task)

    def predict(params, batch):
        return {name: functions[name](params, batch) for name in names}

    return compile_prediction(predict, mesh)


def outputs(fn: Callable, params: Any, batches: Iterable[Mapping], mesh: Mesh | None
            ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Yield (outputs of `fn`, batch) for each batch, both without the rows whose `mask` is False.

    One batch is computed while the next is prepared. Arrays that are sharded over several hosts are left out.
    """
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))
    several = mesh is not None and not sharding.is_fully_addressable

    def to_host(result, batch):
        hosts.heartbeat("evaluating", blocking=True)
        return tuple({k: np.asarray(v)[batch["mask"]] for k, v in arrays.items() if _is_local(v)}
                     for arrays in (result, batch))

    def to_device(value):
        if several:
            return put_global(np.asarray(value), sharding) if _is_local(value) else value
        return jax.device_put(value, sharding)

    pending = None
    for batch in batches:
        hosts.heartbeat("evaluating")
        current = fn(params, {k: to_device(batch[k]) for k in INPUTS if k in batch}), batch
        if pending is not None:
            yield to_host(*pending)
        pending = current
    if pending is not None:
        yield to_host(*pending)


def _is_local(value: Any) -> bool:
    return not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated


def predict(task: Task, name: str, params: Params, batches: Iterable[Mapping], shapes: Mapping[str, Any],
            mesh: Mesh | None) -> np.ndarray:
    """Return `predictions(task)[name]` of all batches, concatenated; `shapes` of a batch matter if there are none."""
    results = [result[name] for result, _ in outputs(predict_fn(task, (name,), mesh), params, batches, mesh)]
    if results:
        return np.concatenate(results)
    row = jax.eval_shape(predictions(task)[name], params, shapes)
    return np.zeros((0, *row.shape[1:]), np.float32)


def decode_ahead(items: Iterable[Any], decode: Callable[[Any], Any], ahead: int) -> Iterator[tuple[Any, Future]]:
    """Yield (item, future of `decode(item)`) in order, while threads decode up to `ahead` items in advance."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[tuple[Any, Future]] = deque()
        for item in items:
            pending.append((item, pool.submit(decode, item)))
            if len(pending) >= ahead:
                yield pending.popleft()
        yield from pending


def pad_batch(batch: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Return `batch` with its last row repeated up to `size` rows, and `mask`, which is False for the repetitions."""
    count = len(next(iter(batch.values())))
    padded = {name: np.concatenate([rows, np.repeat(rows[-1:], size - count, axis=0)]) for name, rows in batch.items()}
    return padded | {"mask": np.arange(size) < count}


def power_of_two(count: int) -> int:
    """Return the next power of two, from `count` on."""
    return 1 << (count - 1).bit_length()


def pad_to_power_of_two(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Return `batch` padded by `pad_batch`, so that batches of any size need only a few compiled programs."""
    return pad_batch(batch, padded_batch_size(power_of_two(len(next(iter(batch.values())))), mesh))
