"""How property-based tests draw: the same examples on every machine, however slow it is."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = settings(derandomize=True, deadline=None, database=None, max_examples=60,
                    suppress_health_check=list(HealthCheck))
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 1000, 2**31, 2**63, -2**70, 0.5, -0.0, 1e300]) | st.floats()
TEXTS = st.text(st.characters(), max_size=12)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
                    max_leaves=5)


def places(value, path=()):
    """The paths of all parts of a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value, path, new):
    """A JSON value with another part at a path."""
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed
