"""Colours of latents on their way."""

import numpy as np

from dynaip_jax.sampling import preview


def test_colours_of_a_preview_follow_a_linear_autoencoder(monkeypatch):
    """A made one: a latent is what a random matrix makes of its pixels' mean colour."""

    class Family:
        multiple, mix = 4, np.random.default_rng(1).normal(size=(3, 6))

        def latents(self, pictures):
            b, h, w, _ = pictures.shape
            return np.moveaxis(pictures.reshape(b, h // 4, 4, w // 4, 4, 3).mean(axis=(2, 4)) @ self.mix + 0.5, -1, 1)

    family = Family()
    monkeypatch.setattr(preview, "_latents", lambda family, vae, pictures: family.latents(np.asarray(pictures)))
    picture = preview.patterns(3, 64)[2:]
    look = preview.Preview.fit(family, None)
    colours = np.asarray(look(family.latents(picture)[0], 16, 16), float) / 127.5 - 1
    assert np.abs(colours - picture[0].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))).max() < 0.03
