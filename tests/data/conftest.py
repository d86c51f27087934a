"""What tests of data share."""

import pytest

from tests.data.photos import make_dataset


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """44 rows: 4 photographs, 11 times."""
    return make_dataset(tmp_path_factory.mktemp("photos"), times=11)
