"""Progress bars without tqdm."""

from __future__ import annotations

import sys

from unetpp_fast.common.progress import SilentBar, progress_bar


def test_without_tqdm_a_bar_only_counts(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar(total=3, initial=1, desc="epoch", disable=None) as bar:
        assert isinstance(bar, SilentBar)
        bar.set_postfix(loss="0.5")
        bar.set_postfix_str("U-Net")
        bar.update()
        bar.update(2)
        assert bar.n == 4
    bar = progress_bar("ab", desc="files")
    assert list(bar) == ["a", "b"] and bar.n == 2
