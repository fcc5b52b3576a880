from dataclasses import astuple

import numpy as np
import pytest

from jaxmm.capfilt.html_report import diversity, measure, write_report
from jaxmm.capfilt.stages import SELECTED


def test_diversity_by_hand():
    varied = diversity(["a red red circle", "A star", "a red red circle"])
    # 10 words of which 4 differ; pairs: a-red, red-red, red-circle (each twice), a-star
    assert astuple(varied) == pytest.approx((3, 2 / 3, 10 / 3, 4, 4 / 10, 4 / 7))
    assert astuple(diversity([])) == (0, 0.0, 0.0, 0, 0.0, 0.0)


def test_it_counts_what_the_tables_hold(finished):
    folder, _ = finished
    shards = folder.tables(SELECTED)
    measured = measure(shards)
    columns = {name: [value for shard in shards for value in shard.columns[name]] for name in ("origin", "kept")}
    for origin, texts in measured["origins"].items():
        kept = [k for k, o in zip(columns["kept"], columns["origin"], strict=True) if o == origin]
        assert (texts["texts"], texts["kept"]) == (len(kept), sum(kept))
        assert texts["noise"] == pytest.approx(1 - np.mean(kept)) and sum(texts["reasons"].values()) == len(kept)
    assert measured["origins"]["human"]["noise"] == 0 and 0.4 < measured["origins"]["synthetic"]["noise"] < 0.6
    assert measured["bad"] == {"empty": 1, "no image": 1, "not an image": 1, "too large": 1, "truncated": 1}
    assert measured["pictures"] == 18 + 16 - 5 + 3 + 6


def test_the_page_shows_images_and_why_texts_go(finished):
    folder, _ = finished
    page = write_report(folder, examples=5).read_text()
    assert page.count("data:image/webp") == 5 and "its score is too low" in page and "truncated" in page
    assert "synthetic" in page and str(folder.manifest["captioner_digests"][0]) in page
