import pytest
import torch

from localdit.pipelines.canvas import Canvas, latents_to_repaint


@pytest.fixture
def images(seeded):
    return torch.rand(1, 3, 96, 64, generator=seeded(3))


def box_mask(left, top, right, bottom, height=96, width=64):
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask


def test_what_is_masked_is_replaced_and_nothing_else(images):
    mask = box_mask(10, 20, 30, 50)
    canvas = Canvas.scaled(images, mask, 96, 64)
    assert torch.equal(torch.cat(canvas.part(96, 64), 1), torch.cat([images, mask], 1))
    result = canvas.put_back(torch.full((2, 3, 96, 64), 0.25))
    inside = mask.bool().expand(2, 3, -1, -1)
    assert (result[inside] == 0.25).all()
    assert torch.equal(result[~inside], images.expand(2, -1, -1, -1)[~inside])


def test_soft_masks_blend(images):
    canvas = Canvas.scaled(images, torch.full((1, 1, 96, 64), 0.75), 96, 64)
    result = canvas.put_back(torch.ones(1, 3, 96, 64))
    torch.testing.assert_close(result, 0.75 + 0.25 * images)


def test_pictures_are_scaled_to_the_size_asked_for(images):
    canvas = Canvas.scaled(images, box_mask(0, 0, 64, 48), 48, 32)
    part, mask = canvas.part(48, 32)
    assert part.shape == (1, 3, 48, 32)
    assert mask[..., :23, :].min() > 0.5 > mask[..., 25:, :].max()


def test_the_surroundings_of_a_mask_are_cut_out_and_put_back(images):
    mask = box_mask(20, 40, 28, 48)
    canvas = Canvas.around_masks(images, mask, 64, 64, padding=4)
    assert canvas.boxes == [(16, 36, 32, 52)]
    part, part_mask = canvas.part(64, 64)
    assert part.shape == (1, 3, 64, 64)
    torch.testing.assert_close(part.mean(), images[..., 36:52, 16:32].mean(), atol=1e-2, rtol=0)
    assert part_mask[..., 20:44, 20:44].min() == 1
    assert part_mask[..., :12, :].max() == 0
    result = canvas.put_back(torch.full((1, 3, 64, 64), 0.25))
    inside = mask.bool().expand(1, 3, -1, -1)
    torch.testing.assert_close(result[inside], torch.full_like(result[inside], 0.25))
    assert torch.equal(result[~inside], images[~inside])


def test_the_part_is_in_the_proportions_asked_for_and_within_the_picture(images):
    wide = Canvas.around_masks(images, box_mask(0, 0, 8, 8), 32, 64, padding=0)
    assert wide.boxes == [(0, 0, 16, 8)]
    large = Canvas.around_masks(images, box_mask(0, 0, 64, 96), 64, 64, padding=9)
    assert large.boxes == [(0, 0, 64, 96)]


def test_faint_values_do_not_widen_the_part(images):
    mask = box_mask(20, 40, 28, 48).clamp(min=0.02)
    assert Canvas.around_masks(images, mask, 64, 64, 4).boxes == [(16, 36, 32, 52)]


def test_each_prompt_has_its_own_mask_and_each_picture_its_prompts(images):
    masks = torch.cat([box_mask(20, 40, 28, 48), box_mask(0, 0, 16, 16)])
    for canvas in (
        Canvas.scaled(images, masks, 96, 64),
        Canvas.around_masks(images, masks, 96, 64, 0),
    ):
        pictures = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 96, 64) / 8
        result = canvas.put_back(pictures)
        for row, (y, x) in enumerate([(44, 24), (44, 24), (8, 8), (8, 8)]):
            torch.testing.assert_close(result[row, :, y, x], torch.full((3,), row / 8))
            y, x = (8, 8) if row < 2 else (44, 24)
            assert torch.equal(result[row, :, y, x], images[0, :, y, x])


def test_a_latent_is_repainted_where_any_of_its_pixels_is():
    masks = torch.cat([box_mask(17, 40, 18, 41), 0.4 * box_mask(0, 0, 64, 96)])
    repaint = latents_to_repaint(masks, 8, rows=4)
    assert repaint.shape == (4, 1, 12, 8)
    assert repaint.sum(dim=(1, 2, 3)).tolist() == [1, 1, 0, 0]
    assert repaint[1, 0, 5, 2]
