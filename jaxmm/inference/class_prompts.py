"""Prompts that name a class, and their embeddings, for zero-shot classification (CLIP, section 3.1)."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

TEMPLATES = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
             "a {} in a video game.", "art of the {}.", "a photo of the small {}.")
"""The seven that OpenAI selected; on ImageNet slightly better than their eighty."""
ARTICLE = re.compile(r"(an?|the)\s+(?=\S)", re.IGNORECASE)
"""The article that a label begins with."""
BESIDE = re.compile(r"\ban?\s+\{\}", re.IGNORECASE)
"""An indefinite article right before the class name."""
BEFORE = re.compile(r"\b(an?|the)\s+((?!of\b|in\b|on\b|with\b|by\b|from\b|for\b|at\b|to\b|and\b|showing\b|"
                    r"depicting\b|containing\b|featuring\b)[\w'-]+\s+)*\{\}", re.IGNORECASE)
"""An article that belongs to the class name, with or without adjectives between them."""


def class_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every template with each class name in place of `{}`, the templates of a class one after the other.

    A class name may begin with an article. If the template has one too, only one stays: "an elk" becomes "a photo of an
    elk" and "a photo of the large elk".
    """
    return [_fill(template, name) for name in classes for template in templates]


def _fill(template: str, name: str) -> str:
    article = ARTICLE.match(name)
    if article and BESIDE.search(template):
        return BESIDE.sub(lambda _: name, template)
    if article and BEFORE.search(template):
        name = name[article.end():]
    return template.replace("{}", name)


def class_means(prompts: Float[np.ndarray, "p e"], classes: int) -> Float[np.ndarray, "classes e"]:
    """Return the normalised mean of each class's prompt embeddings, of length 1."""
    return unit(prompts.reshape(classes, -1, prompts.shape[1]).mean(axis=1))


def likeliest_labels(logits: Float[np.ndarray, "b c"], labels: Sequence[str], top: int
                     ) -> list[list[tuple[str, float]]]:
    """Return the `top` likeliest (label, probability) of each row of logits, best first."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return [[(labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top]] for row in shares]


def unit(x: np.ndarray) -> np.ndarray:
    """Return the rows of `x` scaled to length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
