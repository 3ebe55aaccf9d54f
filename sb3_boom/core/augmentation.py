"""Random shifts of images (torch only)."""

import torch as th


def random_shift(images: th.Tensor, max_shift: int) -> th.Tensor:
    """
    Shift every image by up to ``max_shift`` pixels either way in both directions, repeating its border.

    :param images: ``[n, C, height, width]``, any dtype
    :param max_shift: in pixels
    :return: same shape and dtype
    """
    n, _, height, width = images.shape
    shift = th.randint(-max_shift, max_shift + 1, (2, n, 1), device=images.device)
    rows, columns = (
        (th.arange(size, device=images.device) + offset).clamp(0, size - 1)
        for size, offset in zip((height, width), shift, strict=True)
    )
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))
