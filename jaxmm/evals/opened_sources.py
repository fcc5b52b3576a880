"""Open the sources of evaluators, and group them by image, once per run."""

from jaxmm.data.base import Source
from jaxmm.data.sources.registry import open_source
from jaxmm.evals.by_image import by_image


class OpenedSources:
    """The sources that the evaluators of a run have opened, and views of sources by image."""

    def __init__(self):
        self._opened: dict[tuple[str, str | None], Source] = {}
        self._views: dict[int, tuple[Source, Source]] = {}

    def open(self, spec: str, data_dir: str | None) -> Source:
        """Return the source that `spec` names; the same one at every call."""
        if (spec, data_dir) not in self._opened:
            self._opened[spec, data_dir] = open_source(spec, data_dir=data_dir)
        return self._opened[spec, data_dir]

    def by_image(self, source: Source) -> Source:
        """Return the view of `source` with one record per image; the same one at every call."""
        if id(source) not in self._views:
            self._views[id(source)] = source, by_image(source)      # with the source, so that its id stays its own
        return self._views[id(source)][1]
