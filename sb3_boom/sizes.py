"""Sizes of the networks, by name."""

import numbers

LAYER_SIZES = ("enc_dim", "mlp_dim", "latent_dim", "n_critics", "n_enc_layers")
# name: LAYER_SIZES; all but "tiny" are TD-MPC2's
MODEL_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (128, 128, 64, 5, 2),
    "1M": (256, 384, 128, 2, 2),
    "5M": (256, 512, 512, 5, 2),
    "19M": (1024, 1024, 768, 5, 3),
    "48M": (1792, 1792, 768, 5, 4),
    "317M": (4096, 4096, 1376, 8, 5),
}


def is_dog_sized(action_dim: int) -> bool:
    """
    Whether the paper's settings for its dog tasks apply, which the release picks by the action dimension.

    :param action_dim: ``A``
    :return: 24 <= A <= 48
    """
    return 24 <= action_dim <= 48


def layer_sizes(model_size: str, given: tuple[int | None, ...]) -> dict[str, int]:
    """
    :param model_size: a key of :data:`MODEL_SIZES`
    :param given: in the order of :data:`LAYER_SIZES`, what overrides the named size's; None where nothing does
    :return: the sizes, by name
    :raises ValueError: for a name or a size that is none
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(f"model_size must be one of {', '.join(MODEL_SIZES)}, not {model_size!r}")
    sizes: dict[str, int] = {}
    for name, own, size in zip(LAYER_SIZES, given, MODEL_SIZES[model_size], strict=True):
        value = size if own is None else own
        minimum = 2 if name == "n_critics" else 1
        if not isinstance(value, numbers.Integral) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")
        sizes[name] = int(value)
    return sizes
