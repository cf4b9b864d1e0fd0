"""Feature selection by attribution."""

from dataclasses import replace

import pytest
import torch
from conftest import random_batch, tiny_sae

from undertow.behaviours.logit_difference import LogitDifference
from undertow.errors import UndertowError
from undertow.features.attribution import attribution_scores, select_by_attribution
from undertow.models.residual import Edit, run
from undertow.saes.normalisation import LayerNorm


def behaviour():
    return LogitDifference(torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10]))


@pytest.mark.parametrize("normaliser", [None, LayerNorm()])
def test_scores_are_the_first_order_effect_of_removing_a_feature(tiny, normaliser):
    """`z_f * (W_dec[f] . g)`: against a small finite change of the stream along each feature."""
    sae, batch, score = replace(tiny_sae(), normaliser=normaliser), random_batch(), behaviour()
    scores = attribution_scores(tiny, batch, score, sae)
    rows = torch.arange(3)
    with torch.no_grad():
        for feature in scores.abs().topk(5).indices.tolist():

            def value(step, feature=feature):
                def shrink(stream, where):
                    z = sae.encode(stream)[..., feature, None]
                    return stream + step * z * sae.factor(stream) * sae.W_dec[feature] * where.mask[..., None]

                return score.value(tiny, run(tiny, batch, [Edit(sae.site, shrink)]), rows).double()

            slope = float(((value(1e-2) - value(-1e-2)) / 2e-2).mean())
            assert float(scores[feature]) == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_last_position_only_counts_the_last_position(tiny):
    sae, batch = tiny_sae(), random_batch()
    last = attribution_scores(tiny, batch, behaviour(), sae, "last")
    every = attribution_scores(tiny, batch, behaviour(), sae, "all")
    assert not torch.allclose(last, every)


def test_best_first_and_batching_does_not_matter(tiny):
    sae, batch, score = tiny_sae(), random_batch(), behaviour()
    from undertow.behaviours.rows import Rows

    whole = select_by_attribution(tiny, [(batch, score)], sae, 5)
    pieces = [(batch.select(torch.tensor(r)).trimmed(), Rows(score, torch.tensor(r))) for r in ([0, 1], [2])]
    split = select_by_attribution(tiny, pieces, sae, 5)
    assert whole.indices == split.indices
    assert whole.scores == sorted(whole.scores, reverse=True)
    with pytest.raises(UndertowError, match="have a positive attribution"):
        select_by_attribution(tiny, [(batch, score)], sae, 95)
