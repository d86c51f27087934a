"""What tests of pictures share."""

import pytest
from skimage import data


@pytest.fixture(scope="module")
def photo():
    return data.chelsea()  # 300 x 451
