"""How a processor is called: measurements of two kinds of it must not be taken for one another's."""

from __future__ import annotations

import pytest

from unetpp_fast.common import devices

TEXT = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {}\nflags\t\t: fpu {}\n"


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("AMD EPYC", "avx2 avx512f", "AMD EPYC family 26 model 2 AVX-512"),
        ("AMD EPYC 9654 96-Core Processor", "avx2", "AMD EPYC 9654 96-Core Processor AVX2"),
        ("Intel(R) Xeon(R) Processor", "sse2", "Intel(R) Xeon(R) Processor family 26 model 2"),
    ],
)
def test_a_name_without_a_number_is_told_with_family_and_model(name, flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(TEXT.format(name, flags), encoding="utf-8")
    assert devices.processor() == said


def test_a_system_that_tells_less(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    assert devices.processor()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n", encoding="utf-8")
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
    assert devices.processor() == "aarch64"
