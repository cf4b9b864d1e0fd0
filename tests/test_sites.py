"""Addresses of the residual stream."""

import pytest
from conftest import random_batch, tiny_llama

from undertow.errors import UndertowError
from undertow.models.batch import Batch
from undertow.models.residual import Edit, Recorder, run
from undertow.sites import Site


@pytest.mark.parametrize(
    ("address", "boundary"),
    [("blocks.0.hook_resid_pre", 0), ("blocks.12.hook_resid_pre", 12), ("blocks.11.hook_resid_post", 12),
     ("model.layers.11", 12), ("transformer.h.0", 1), ("gpt_neox.layers.3", 4), ("blocks.3", 4)],
)  # fmt: skip
def test_addresses_of_one_place_are_equal(address, boundary):
    assert Site.parse(address) == Site(boundary)
    assert Site.parse(str(Site(boundary))) == Site(boundary)


@pytest.mark.parametrize(
    "address", ["", "blocks.3.hook_mlp_out", "blocks.-1.hook_resid_pre", "layers", "model.layers.3.mlp.experts.2"]
)
def test_other_addresses_are_refused(address):
    with pytest.raises(UndertowError, match="not an address"):
        Site.parse(address)


def test_sites_beyond_the_model_are_refused():
    with pytest.raises(UndertowError, match="layers 0 to 3"):
        Site(5).check(4)


def test_every_site_records_what_transformers_reports_as_hidden_states():
    model, batch = tiny_llama(), random_batch(lengths=(6, 6))
    recorders = [Recorder(Site(boundary)) for boundary in range(model.n_layers + 1)]
    run(model, batch, [recorder.edit for recorder in recorders])
    reported = model.network(batch.ids, output_hidden_states=True).hidden_states
    for recorder, wanted in zip(recorders[:-1], reported[:-1], strict=True):
        assert (recorder.states - wanted).abs().max() < 1e-6
    # transformers reports the last one after the final norm.
    assert (model.decoder.norm(recorders[-1].states) - reported[-1]).abs().max() < 1e-5


def test_edits_at_one_site_run_in_the_given_order():
    model, batch = tiny_llama(), random_batch()
    recorder = Recorder(Site(2))
    edits = [Edit(Site(2), lambda h, w: h * 0 + 1), Edit(Site(2), lambda h, w: h + 1), recorder.edit]
    run(model, batch, edits)
    assert (recorder.states == 2).all()


def test_hooks_are_removed_after_an_error():
    model, batch = tiny_llama(), random_batch()

    def broken(stream, where):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run(model, batch, [Edit(Site(1), broken)])
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_batches():
    batch = Batch.of([[5, 6], [7, 8, 9]], {7})
    assert batch.mask.tolist() == [[False, True, True], [True, True, True]]
    assert batch.positions.tolist() == [[0, 0, 1], [0, 1, 2]]
    assert batch.special.tolist() == [[False] * 3, [True, False, False]]
    assert batch.select([0]).trimmed().ids.tolist() == [[5, 6]]
    with pytest.raises(ValueError, match="none may be empty"):
        Batch.of([[1], []], set())
