from dataclasses import astuple

import numpy as np
import pytest

from jaxmm.capfilt.html_report import diversity, measure, write_report
from jaxmm.capfilt.stages import SELECTED


def test_diversity_by_hand():
    found = diversity(["a red red circle", "A star", "a red red circle"])
    # 10 words of which 4 differ; pairs: a-red, red-red, red-circle (each twice), a-star
    assert astuple(found) == pytest.approx((3, 2 / 3, 10 / 3, 4, 4 / 10, 4 / 7))
    assert astuple(diversity([])) == (0, 0.0, 0.0, 0, 0.0, 0.0)


def test_it_counts_what_the_tables_hold(finished):
    folder, _ = finished
    shards = folder.tables(SELECTED)
    found = measure(shards)
    columns = {name: [value for shard in shards for value in shard.columns[name]] for name in ("origin", "kept")}
    for origin, each in found["origins"].items():
        kept = [k for k, o in zip(columns["kept"], columns["origin"], strict=True) if o == origin]
        assert (each["texts"], each["kept"]) == (len(kept), sum(kept))
        assert each["noise"] == pytest.approx(1 - np.mean(kept)) and sum(each["reasons"].values()) == len(kept)
    assert found["origins"]["human"]["noise"] == 0 and 0.4 < found["origins"]["synthetic"]["noise"] < 0.6
    assert found["bad"] == {"empty": 1, "no image": 1, "not an image": 1, "too large": 1, "truncated": 1}
    assert found["pictures"] == 18 + 16 - 5 + 3 + 6


def test_the_page_shows_pictures_and_why_texts_go(finished):
    folder, _ = finished
    page = write_report(folder, examples=5).read_text()
    assert page.count("data:image/webp") == 5 and "its score is too low" in page and "truncated" in page
    assert "synthetic" in page and str(folder.manifest["captioner_digests"][0]) in page
