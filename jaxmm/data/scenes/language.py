"""Write captions of, questions about, and noisy web captions of a scene."""

import itertools
import random
import re
from dataclasses import dataclass, replace

from jaxmm.data.scenes.drawing import COLORS, SHAPES, SIZES, Object, Scene, cell, pick, relation, shuffled

NOISE: dict[str, float] = {"correct": 0.4, "other": 0.2, "wrong": 0.1, "truncated": 0.1, "filename": 0.1,
                           "boilerplate": 0.1}
"""Kinds of captions in the web split and their shares."""

_NUMBERS = ("no", "one", "two", "three")
_SYNONYMS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under",
             "small": "little", "large": "big"}
_PLAIN = {said: word for word, said in _SYNONYMS.items()}
_OPENINGS = ("there is", "the picture shows", "we see", "here is")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_BOILERPLATE = ("buy now | free shipping", "click here to download", "image not available", "stock photo",
                "all rights reserved", "share on social media", "add to cart", "home page | contact us",
                "best price {n} % off", "page {n} of {m}", "subscribe to our newsletter", "thumbnail {n}",
                "sold out | more colors available", "copyright 20{n} | all pictures")
_FILES = ("IMG_{a}{b}.jpg", "DSC0{a}{b}.JPG", "image{n}.png", "untitled-{n}.png", "screenshot_20{n}-{m}.png",
          "P10{a}{b}.jpeg", "download ({n}).jpg", "{a}{b}{n}_thumb.gif")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene and its only correct answer.

    `kind` is color, shape, size, count, relation or exists.
    """

    kind: str
    question: str
    answer: str


def _say(rng: random.Random | None, word: str) -> str:
    return _SYNONYMS[word] if rng is not None and rng.random() < 0.3 else word


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _short(o: Object) -> str:
    return f"{o.color} {o.shape}"


def _long(o: Object, rng: random.Random | None = None) -> str:
    return _article(f"{_say(rng, o.size)} {_short(o)}")


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _related(objects: list[Object], rng: random.Random | None = None) -> str:
    """Describe all objects with all attributes; relate each later one to another."""
    a, *rest = objects
    if not rest:
        return f"{_long(a, rng)} {cell(a)}"
    b, *rest = rest
    text = f"{_long(a, rng)} {_say(rng, relation(a, b))} {_long(b, rng)}"
    for c in rest:
        text += f", and {_long(c, rng)} {_say(rng, relation(c, b))} the {_short(b)}"
    return text


def describe(scene: Scene) -> str:
    """Return the full description in fixed words and order. No two scenes of the data set share it."""
    return _related(list(scene.objects))


def captions(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """Write five true captions.

    The first is `describe`'s, three more name all objects with size, colour and shape, and the last leaves out sizes
    and places.
    """
    a, *rest = order = shuffled(rng, scene.objects)
    opening = pick(rng, _OPENINGS)
    if not rest:
        return (describe(scene), f"{opening} {_long(a, rng)} {cell(a)}", f"{cell(a)}, {_long(a, rng)}",
                f"one {a.shape}: {_long(a, rng)} {cell(a)}", _article(_short(a)))
    b = rest[0]
    noun = _plural(a.shape) if all(o.shape == a.shape for o in order) else "shapes"
    listed = _list([_long(o, rng) for o in order])
    related = f"{listed}, the {_short(a)} {_say(rng, relation(a, b))} the {_short(b)}"
    short = _list([_article(_short(o)) for o in shuffled(rng, order)])
    return (describe(scene), f"{opening} {_related(shuffled(rng, order), rng)}", related,
            f"{_NUMBERS[len(order)]} {noun}: {listed}", short)


def plain(caption: str) -> str:
    """Return `caption` in fixed words without punctuation, equal for captions that differ in synonyms only."""
    text = " ".join(re.findall(r"\w+", caption.lower()))
    for said, word in _PLAIN.items():
        text = re.sub(rf"\b{said}\b", word, text)
    return text


def true_captions(scene: Scene) -> frozenset[str]:
    """Return all captions that `captions` may write of a scene, with its objects in any order, made `plain`."""
    result: set[str] = set()
    for order in itertools.permutations(scene.objects):
        a, *rest = order
        related = _related(list(order))
        noun = _plural(a.shape) if rest and all(o.shape == a.shape for o in order) else "shapes" if rest else a.shape
        listed, short = _list([_long(o) for o in order]), _list([_article(_short(o)) for o in order])
        result |= {short, related, *(f"{opening} {related}" for opening in _OPENINGS)}
        if rest:
            result |= {f"{_NUMBERS[len(order)]} {noun}: {listed}",
                      *(f"{listed}, the {_short(x)} {relation(x, y)} the {_short(y)}"
                        for x, y in itertools.permutations(order, 2))}
        else:
            result |= {f"{cell(a)}, {_long(a)}", f"one {noun}: {related}"}
    return frozenset(map(plain, result))


def questions(scene: Scene, rng: random.Random) -> tuple[Question, ...]:
    """Ask questions of every kind that the scene allows, each with one correct answer."""
    objects, asked = scene.objects, []

    def ask(kind: str, question: str, answer: object) -> None:
        asked.append(Question(kind=kind, question=f"{question}?", answer=str(answer)))

    for attribute, asks, known in (("color", "what color is", "shape"), ("shape", "what shape is", "color")):
        known_once = [o for o in objects if sum(getattr(p, known) == getattr(o, known) for p in objects) == 1]
        if known_once:
            o = pick(rng, known_once)
            thing = o.shape if known == "shape" else f"{o.color} object"
            ask(attribute, f"{asks} the {thing}", getattr(o, attribute))
    o = pick(rng, objects)
    ask("size", f"what size is the {_short(o)}", o.size)
    what, counted = pick(rng, [
        ("shapes", objects), (_plural(o.shape), [p for p in objects if p.shape == o.shape]),
        (f"{o.color} objects", [p for p in objects if p.color == o.color]),
        *((f"{size} shapes", [p for p in objects if p.size == size]) for size in SIZES)])
    ask("count", f"how many {what} are there", len(counted))
    if len(objects) > 1:
        a, b = shuffled(rng, objects)[:2]
        true = rng.random() < 0.5
        asserted = relation(a, b) if true else _OPPOSITE[relation(a, b)]
        ask("relation", f"is the {_short(a)} {asserted} the {_short(b)}", "yes" if true else "no")
    if rng.random() < 0.5:
        ask("exists", f"is there {_article(_short(o))}", "yes")
    else:      # half correct: the shape in another colour, or the colour on another shape
        absent = _absent(objects, o, pick(rng, ("color", "shape")), rng)
        ask("exists", f"is there {_article(_short(absent))}", "no")
    return tuple(asked)


def _absent(objects: tuple[Object, ...], o: Object, attribute: str, rng: random.Random) -> Object:
    """Return `o` with a colour or a shape that no object of the scene has."""
    there = {getattr(p, attribute) for p in objects}
    names = COLORS if attribute == "color" else SHAPES
    return replace(o, **{attribute: pick(rng, [name for name in names if name not in there])})


def _wrong(scene: Scene, rng: random.Random) -> str:
    """Write a full description with one wrong colour, shape or size, or with every relation reversed."""
    objects = list(scene.objects)
    i = int(rng.random() * len(objects))
    what = pick(rng, ("color", "shape", "size", "relation")[:3 + (len(objects) > 1)])
    if what == "relation":
        objects = [replace(o, x=1 - o.x, y=1 - o.y) for o in objects]
    elif what == "size":
        objects[i] = replace(objects[i], size="large" if objects[i].size == "small" else "small")
    else:
        objects[i] = _absent(scene.objects, objects[i], what, rng)
    return _related(objects, rng)


def _truncated(text: str, rng: random.Random) -> str:
    """Return at most two fifths of the words; the last may be cut, or followed by an ellipsis."""
    words = text.split()
    words = words[:2 + int(rng.random() * (len(words) * 2 // 5 - 1))]
    if rng.random() < 0.5:
        return " ".join(words) + "..."
    return " ".join(words)[:-2].rstrip()


def web_caption(scene: Scene, others: list[Scene], rng: random.Random) -> tuple[str, str]:
    """Write a caption as noisy as those of a web crawl; return it and its kind, a key of `NOISE`.

    `others` are scenes of other images, whose captions are the noise of kind "other".
    """
    u, edges = rng.random(), itertools.accumulate(NOISE.values())
    kind = next((kind for kind, edge in zip(NOISE, edges, strict=True) if u < edge), "correct")
    true = captions(scene, rng)
    if kind == "correct":
        return pick(rng, true), kind
    if kind == "other":
        looks = {_short(o) for o in scene.objects}
        while True:
            other = pick(rng, others)
            if any(_short(o) not in looks for o in other.objects):      # else it could be true of this scene too
                return pick(rng, captions(other, rng)), kind
    if kind == "wrong":
        return _wrong(scene, rng), kind
    if kind == "truncated":
        return _truncated(pick(rng, true[:3]), rng), kind
    digits = {name: 10 + int(rng.random() * 90) for name in "abnm"}
    return pick(rng, _FILES if kind == "filename" else _BOILERPLATE).format(**digits), kind
