"""4096 x 4096 pixels from the model in the box, in bounded memory."""

import pytest
from PIL import Image

from benchmarks.worker import in_own_process


@pytest.mark.slow
def test_a_picture_of_16_megapixels_needs_bounded_memory(tmp_path):
    """Measured: 1.6 GiB, of which 0.4 are imports and weights."""
    path = tmp_path / "large.png"
    result = in_own_process("pipeline_large:draw_large", pixels=4096, steps=1, path=str(path))
    assert Image.open(path).size == (4096, 4096)
    assert result["peak"] < 2.2 * 2**30
