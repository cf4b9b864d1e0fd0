"""Reading SAEs: folding, refusals (P17, E7)."""

import json

import pytest
import torch
from conftest import D, tiny_llama, tiny_sae
from safetensors.torch import save_file

from undertow.errors import UndertowError
from undertow.saes.activations import JumpReLU, ReLU, TopK
from undertow.saes.load import load_sae, read_sae
from undertow.saes.quality import ExplainedVariance, Quality

LATENTS = 40


def write(folder, architecture="jumprelu", **changes):
    """A SAELens folder; `changes` go to the configuration, or replace a tensor."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, LATENTS, generator=generator), "b_enc": torch.randn(LATENTS, generator=generator),
        "W_dec": torch.randn(LATENTS, D, generator=generator), "b_dec": torch.randn(D, generator=generator),
    }  # fmt: skip
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(LATENTS, generator=generator)
    config = {
        "architecture": architecture, "d_in": D, "d_sae": LATENTS, "apply_b_dec_to_input": True,
        "normalize_activations": "none", "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }  # fmt: skip
    for key, value in changes.items():
        (tensors if isinstance(value, torch.Tensor) else config)[key] = value
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("architecture", "kind"), [("jumprelu", JumpReLU), ("standard", ReLU), ("topk", TopK)])
def test_encode_and_decode_as_written(tmp_path, architecture, kind, subtract):
    t = write(tmp_path, architecture, apply_b_dec_to_input=subtract, k=5)
    sae = read_sae(str(tmp_path), "x")
    assert isinstance(sae.activation, kind)
    h = torch.randn(6, D)
    pre = (h - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"]
    if architecture == "jumprelu":
        z = torch.where(pre > t["threshold"], pre.relu(), 0.0)
    elif architecture == "topk":
        z = torch.zeros_like(pre).scatter(-1, pre.topk(5).indices, pre.topk(5).values.relu())
    else:
        z = pre.relu()
    assert torch.allclose(sae.encode(h), z, atol=1e-4)
    assert torch.allclose(sae.decode(z, h), z @ t["W_dec"] + t["b_dec"], atol=1e-4)
    features = sae.features([3, 30])
    assert torch.allclose(features.read(h).post, z[:, [3, 30]], atol=1e-4)


def test_float16_weights_become_float32(tmp_path):
    """P17."""
    t = write(tmp_path)
    save_file({name: tensor.half() for name, tensor in t.items()}, tmp_path / "sae_weights.safetensors")
    sae = read_sae(str(tmp_path), "x")
    assert {sae.W_enc.dtype, sae.W_dec.dtype, sae.b_enc.dtype} == {torch.float32}


def test_centred_input_is_folded(tmp_path):
    t = write(tmp_path, apply_b_dec_to_input=False)
    sae = read_sae(str(tmp_path), "x", centre_input=True)
    h = torch.randn(6, D) + 5
    pre = (h - h.mean(-1, keepdim=True)) @ t["W_enc"] + t["b_enc"]
    assert torch.allclose(sae.features([0, 1]).read(h).pre, pre[:, :2], atol=1e-4)
    assert torch.allclose(sae.target(h).mean(-1), torch.zeros(6), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": torch.zeros(D, LATENTS - 1)}, r"W_enc has shape \[32, 39\], expected \[32, 40\]"),
        ({"b_dec": torch.full((D,), float("nan"))}, "b_dec holds values that are NaN"),
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"scaling_factor": torch.full((LATENTS,), 2.0)}, "fine-tuning scaling factor"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations is 'batch_norm'"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"metadata": {}}, "names no hook point"),
        ({"d_sae": "many"}, "d_sae is 'many', expected a positive whole number"),
    ],
)
def test_refusals(tmp_path, changes, message):
    write(tmp_path, **changes)
    with pytest.raises(UndertowError, match=message):
        read_sae(str(tmp_path), "x")


def test_truncated_and_missing_files(tmp_path):
    write(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UndertowError, match="sae_weights.safetensors cannot be read"):
        read_sae(str(tmp_path), "x")
    weights.unlink()
    with pytest.raises(UndertowError, match="holds no SAE weights that are known"):
        read_sae(str(tmp_path), "x")
    with pytest.raises(UndertowError, match="is not a folder"):
        read_sae(str(tmp_path / "nowhere"), "x")


def test_pairs_that_do_not_fit(tmp_path):
    write(tmp_path)
    with pytest.raises(UndertowError, match="width of 32|width 32"):
        load_sae(str(tmp_path), tiny_llama(d=16))
    with pytest.raises(UndertowError, match="beyond the model"):
        load_sae(str(tmp_path), tiny_llama(), site="blocks.7.hook_resid_post")
    with pytest.raises(UndertowError, match="'./nothing' is not a folder"):
        load_sae("./nothing", tiny_llama())
    with pytest.raises(UndertowError, match="no SAE is packaged for model 'tiny'"):
        load_sae(None, tiny_llama())


def test_jumprelu_is_strict_and_ordinary_positions_follow_the_limit():
    from dataclasses import replace

    assert JumpReLU(torch.tensor([1.0]))(torch.tensor([[1.0], [1.1]])).tolist() == [[0.0], [pytest.approx(1.1)]]
    sae = replace(tiny_sae(), norm_limit=10.0)
    assert sae.ordinary(torch.tensor([[[0.1] * D, [9.0] * D]])).tolist() == [[True, False]]


def test_loss_recovered():
    quality = Quality(100, 1.0, 0.9, 10, 0, loss_clean=3.0, loss_reconstructed=3.5, loss_zeroed=13.0)
    assert quality.loss_recovered == pytest.approx(0.95)


def test_a_bad_card_does_not_lower_the_bar():
    """A card that says -1.7 must not make -1.7 acceptable: the least explained variance holds with a card as without."""
    from dataclasses import replace

    from undertow.preflight import _quality_checks

    quality = Quality(100, 1.0, -1.7, 10, 0, loss_clean=3.0, loss_reconstructed=9.0, loss_zeroed=13.0)
    for card in ({}, {"held_out": {"explained_variance": -1.7}}):
        checks = {check.name: check for check in _quality_checks(quality, replace(tiny_sae(), card=card))}
        assert not checks["explained variance"].passed


def test_no_position_to_score_is_an_error_with_a_way_out():
    with pytest.raises(UndertowError, match="no position of the text"):
        _ = ExplainedVariance().value
