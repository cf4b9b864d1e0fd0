"""Every architecture x {suffix, padding, generation, sites, logits}: the machinery is exact on each (E2, P7)."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import random_batch, tiny_sae
from families import CONFIGS, LAYERS, WINDOW, D, tiny_model
from safetensors.torch import load_file, save_file
from test_suffix import assert_suffix_is_exact, relative
from torch import nn

from undertow.defences.clamp import Clamp
from undertow.errors import UndertowError
from undertow.models.exactness import LIMITS, exactness
from undertow.models.gguf import check_complete
from undertow.models.language_model import TESTED_FAMILIES, LanguageModel
from undertow.models.load import load_model
from undertow.models.perturbation import Slot, perturbation_edits
from undertow.models.residual import Recorder, generate, run
from undertow.models.suffix import SuffixPass
from undertow.saes.load import fitted
from undertow.sites import Site

# Prompts longer than the sliding windows, so that a prefix does not fit into one.
LENGTHS = (2 * WINDOW + 3, WINDOW - 1, 2 * WINDOW)


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request) -> LanguageModel:
    return tiny_model(request.param)


def test_the_list_of_tested_families_is_the_list_of_tests():
    assert list(TESTED_FAMILIES) == list(CONFIGS)


@pytest.mark.parametrize("boundary", range(LAYERS + 1))
@pytest.mark.parametrize("offsets", [(-1,), (-WINDOW - 2, -1)])
def test_suffix(model, boundary, offsets):
    """Outputs and gradients of the suffix pass equal those of the full pass, under a clamp."""
    clamp = Clamp(tiny_sae(2, Site(min(boundary + 1, LAYERS))).features([0, 5, 9]), "set_if_active", -0.5)
    assert_suffix_is_exact(model, random_batch(lengths=(11, 9, 8)), Site(boundary), [clamp.edit()], offsets)


def test_padding(model):
    """Each sample of a left-padded batch equals that sample alone."""
    batch = random_batch(5, LENGTHS)
    together = run(model, batch)
    for index, length in enumerate(LENGTHS):
        alone = run(model, batch.select([index]).trimmed())[0]
        assert relative(together[index, -length:], alone) <= 1e-5


def test_generation(model):
    """P7: with clamp and perturbation active, decoding with the key-value cache equals decoding without."""
    batch, sae = random_batch(lengths=LENGTHS), tiny_sae()
    slots = (Slot(Site(1), -1), Slot(Site(1), 0), Slot(Site(2), 2))
    delta = 3 * torch.randn(batch.size, 3, D, generator=torch.Generator().manual_seed(0))
    edits = [Clamp(sae.features([1, 2]), "set", 1.0).edit(), *perturbation_edits(slots, delta)]
    cached = generate(model, batch, edits, max_new_tokens=6)
    assert torch.equal(cached, generate(model, batch, edits, max_new_tokens=6, use_cache=False))
    assert not torch.equal(cached, generate(model, batch, max_new_tokens=6))


def test_sites(model):
    """Every address of a place names that place, and the stream there is what transformers returns as hidden states."""
    batch = random_batch(lengths=(6, 6))
    recorders = [Recorder(Site(boundary)) for boundary in range(LAYERS + 1)]
    run(model, batch, [recorder.edit for recorder in recorders])
    hidden = model.decoder(input_ids=batch.ids, output_hidden_states=True).hidden_states
    for boundary, recorder in enumerate(recorders[:-1]):
        assert torch.allclose(recorder.states, hidden[boundary], atol=1e-5)
        assert Site.parse(str(Site(boundary))) == Site(boundary)
    for layer in range(LAYERS):
        names = {f"{model.layers_path}.{layer}", f"blocks.{layer}.hook_resid_post"}
        assert {Site.parse(name) for name in names} == {Site.parse(f"blocks.{layer + 1}.hook_resid_pre")} == {Site.post(layer)}


def test_logits(model):
    """Logits of chosen tokens, and all of them, are those of the network itself, soft-capping and scaling included."""
    batch = random_batch(lengths=(6, 6))
    wanted = model.network(input_ids=batch.ids).logits
    hidden = run(model, batch)
    ids = torch.tensor([[3, 9], [9, 5]])
    assert torch.allclose(model.all_logits(hidden), wanted, atol=1e-5)
    assert torch.allclose(model.logits(hidden[:, -1], ids), wanted[:, -1].gather(1, ids), atol=1e-5)


class Unusual(nn.Module):
    """A decoder whose blocks lie where no known architecture keeps them, around the parts of a real one."""

    def __init__(self, network):
        super().__init__()
        self.config = network.config
        self.trunk = nn.Module()
        self.trunk.inner = network.model
        self.lm_head = network.lm_head
        self.get_input_embeddings, self.get_output_embeddings = network.get_input_embeddings, lambda: self.lm_head


def test_an_unknown_layout_needs_and_takes_a_layers_path():
    network = tiny_model("llama").network
    with pytest.raises(UndertowError, match=r"--layers-path; its module lists are: trunk\.inner\.layers"):
        LanguageModel.wrap(Unusual(network))
    with pytest.raises(UndertowError, match=r"decoder blocks at 'trunk\.layers'"):
        LanguageModel.wrap(Unusual(network), layers_path="trunk.layers")
    model = LanguageModel.wrap(Unusual(network), layers_path="trunk.inner.layers")
    assert model.decoder is network.model
    batch = random_batch()
    plain = run(LanguageModel.wrap(network), batch)
    assert torch.equal(run(model, batch), plain)
    assert relative(SuffixPass(model, batch, Site(2), (), None)(), plain) <= 1e-5


def test_defended_columns_stay_float32_under_bfloat16_weights():
    """P17: under bfloat16 weights the clamp reads and writes in float32; only the stream itself is rounded."""
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    sae, batch = tiny_sae(), random_batch()
    seen, after = Recorder(sae.site), Recorder(sae.site)
    features = sae.features([1, 2, 3])
    clamp = Clamp(features, "set", 0.7, skip_special=False)
    run(model, batch, [seen.edit, clamp.edit(), after.edit])
    read = features.read(seen.states)
    assert seen.states.dtype == torch.bfloat16
    assert {read.pre.dtype, features.W_enc.dtype, sae.W_dec.dtype} == {torch.float32}
    change = ((0.7 - read.post) @ features.W_dec) * batch.mask[..., None]
    assert torch.equal(after.states, seen.states + change.to(torch.bfloat16))


def test_off_loaded_layers(tmp_path):
    """`device_map`: layers whose weights are not in memory are brought in by accelerate; results do not change."""
    from transformers import AutoModelForCausalLM

    whole = tiny_model("llama")
    whole.network.save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": "disk" if layer == 2 else "cpu" for layer in range(LAYERS)}
    spread = LanguageModel.wrap(
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=places, offload_folder=str(tmp_path / "off"))
    )
    assert spread.network.get_output_embeddings().weight.is_meta
    assert spread.device_at(Site(3)) == spread.device == torch.device("cpu")
    batch, ids = random_batch(), torch.tensor([[3, 9]] * 3)
    delta = torch.randn(batch.size, 1, D)
    edits = [Clamp(tiny_sae().features([1]), "set", 1.0).edit(), *perturbation_edits((Slot(Site(3), -1),), delta)]
    for model in (whole, spread):
        hidden = SuffixPass(model, batch, Site(2), edits[:1])(after=edits[1:])
        full = run(model, batch, edits)[:, -1:]
        assert relative(hidden, full) <= 1e-5
    assert torch.allclose(
        spread.logits(run(spread, batch, edits)[:, -1], ids), whole.logits(run(whole, batch, edits)[:, -1], ids), atol=1e-5
    )


def test_inexact_architectures_are_refused_and_exact_ones_pass():
    """Convolutional state is not in the key-value cache: the suffix pass would compute something else, unnoticed."""
    batch = random_batch(lengths=(9, 9, 7))
    assert max(exactness(tiny_model("gemma2"), batch, Site(2)).values()) <= LIMITS[torch.float32]
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=64, hidden_size=D, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, layer_types=["conv", "full_attention"] * 2, initializer_range=0.2,
    )  # fmt: skip
    hybrid = LanguageModel.wrap(transformers.AutoModelForCausalLM.from_config(config))
    assert max(exactness(hybrid, batch, Site(2)).values()) > LIMITS[torch.float32]


def saved(tmp_path):
    model = tiny_model("llama")
    model.network.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path):
    """transformers would leave them random, and only print a warning that the command line silences."""
    tensors, config = saved(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    network, found = load(tmp_path, output_loading_info=True)
    check_complete(network, found)
    missing = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.up_proj" not in name}
    save_file(missing, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UndertowError, match=r"1 weights are missing, among them model\.layers\.2\.mlp\.up_proj"):
        check_complete(*load(tmp_path, output_loading_info=True))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UndertowError, match="of blocks that its configuration lacks"):
        check_complete(*load(tmp_path, output_loading_info=True))


@pytest.mark.parametrize("damage", ["{", "[]", '{"model_type": 5}', '{"model_type": "llama", "num_hidden_layers": "four"}'])
def test_a_damaged_configuration_is_one_line(tmp_path, damage):
    saved(tmp_path)
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(UndertowError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_centring_belongs_to_layer_norms(tmp_path):
    """TransformerLens centres nothing in a model with RMS norms, whatever an SAE's configuration says."""
    sae = replace(tiny_sae(), centred=True)
    assert fitted(sae, tiny_model("gpt2")).centred
    with pytest.raises(UndertowError, match="has no layer norms, and TransformerLens centres nothing.*--raw-input"):
        fitted(sae, tiny_model("llama"))
