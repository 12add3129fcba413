"""Optional dependencies: how a missing one is named."""

from __future__ import annotations

import pytest

from unetpp_fast.common.errors import InputError
from unetpp_fast.common.extras import need


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("demo", r"no_such is missing: pip install 'unetpp_fast\[demo\]'$"),
        (None, "no_such is missing: pip install no_such$"),
    ],
)
def test_a_missing_module_is_named_with_the_command_that_installs_it(extra, says):
    with pytest.raises(InputError, match=says):
        need("no_such.module", extra)
    assert need("json.decoder", extra).JSONDecoder
