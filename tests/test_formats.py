"""SAEs as other libraries write them: encoded and decoded as these libraries do, to 1e-5 (P17, E7).

The files are written by the libraries themselves (`written_by_libraries.py`) where these are installed, as they are in CI;
Gemma Scope's two formats, which no library writes, by their published definition.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from undertow.defences.clamp import Clamp
from undertow.errors import UndertowError
from undertow.models.batch import Batch, Where
from undertow.models.language_model import LanguageModel
from undertow.models.residual import Recorder, run
from undertow.saes import load
from undertow.saes.load import read_sae, sae_fingerprint
from undertow.saes.normalisation import ConstantNorm
from undertow.sites import Site

LATENTS = 96
PACKAGES = {
    "sae-lens": "sae_lens", "eai-sparsify": "sparsify", "dictionary-learning": "dictionary_learning",
    "transformer-lens": "transformer_lens",
}  # fmt: skip


def written_by(library: str, out: Path) -> Path:
    if importlib.util.find_spec(PACKAGES[library]) is None:
        pytest.skip(f"{library} is not installed")
    script = Path(__file__).parent / "written_by_libraries.py"
    done = subprocess.run([sys.executable, str(script), str(out), library], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def sae_lens(tmp_path_factory):
    return written_by("sae-lens", tmp_path_factory.mktemp("sae-lens"))


@pytest.fixture(scope="module")
def sparsify(tmp_path_factory):
    return written_by("eai-sparsify", tmp_path_factory.mktemp("sparsify"))


@pytest.fixture(scope="module")
def dictionary_learning(tmp_path_factory):
    return written_by("dictionary-learning", tmp_path_factory.mktemp("dictionary-learning"))


def assert_as_expected(folder: Path, **overrides):
    """Latents and reconstructions equal the library's, relative to their size."""
    sae = read_sae(str(folder), "any", **overrides)
    expected = load_file(folder / "expected.safetensors")
    h, z, h_hat = (expected[name] for name in ("h", "z", "h_hat"))
    assert 0 < (z != 0).float().mean() < 1, "a test of nothing"
    assert (sae.encode(h) - z).abs().max() <= 1e-5 * z.abs().max()
    assert (sae.decode(z, h) - h_hat).abs().max() <= 1e-5 * h_hat.abs().max()
    chosen = sae.features([3, 50])
    assert torch.allclose(chosen.read(h).post, z[:, [3, 50]], atol=1e-5 * float(z.abs().max()))
    # Drift is read at rounding's scale even where a row is small (P17).
    assert {sae.W_enc.dtype, sae.W_dec.dtype, sae.b_enc.dtype, sae.b_dec.dtype} == {torch.float32}
    return sae


SAE_LENS = [
    "standard", "standard-raw-input", "gated", "jumprelu", "topk", "topk-rescaled", "batchtopk", "batchtopk-checkpoint",
    "matryoshka", "matryoshka-checkpoint", "whitening-folded", "jumprelu-flagged",
    *(f"{name}-{kind}" for kind in ("layer_norm", "constant_norm_rescale") for name in ("standard", "gated", "topk")),
]  # fmt: skip


@pytest.mark.parametrize("name", SAE_LENS)
def test_sae_lens(sae_lens, name):
    sae = assert_as_expected(sae_lens / name)
    assert (sae.site, sae.prepend_bos, sae.neuronpedia) == (Site.post(1), True, "tiny/1-x")


def test_sae_lens_scale_that_the_files_leave_open(sae_lens):
    """An SAE trained on a scaled stream is not used unscaled: it says that it needs the factor, and takes it."""
    assert read_sae(str(sae_lens / "scale-unknown"), "any").scale_unknown
    sae = assert_as_expected(sae_lens / "scale-unknown", input_scale=0.4)
    assert not sae.scale_unknown
    rescaled = read_sae(str(sae_lens / "scale-unknown"), "any").rescaled(0.4)
    assert torch.allclose(rescaled.W_enc, sae.W_enc)
    assert torch.allclose(rescaled.b_dec, sae.b_dec)


@pytest.mark.parametrize(
    ("name", "message"), [("transcoder", "is of a transcoder"), ("whitening-unfolded", "fold_activation_whitening")]
)
def test_sae_lens_refusals(sae_lens, name, message):
    with pytest.raises(UndertowError, match=message):
        read_sae(str(sae_lens / name), "any")


def test_sae_lens_flat_configuration_of_old_releases(sae_lens, tmp_path):
    """Before version 6 everything lay flat, booleans stood for normalisations, and TopK was a kind of standard."""
    for file in ("sae_weights.safetensors", "expected.safetensors"):
        (tmp_path / file).write_bytes((sae_lens / "topk" / file).read_bytes())
    old = {
        "d_in": D, "d_sae": LATENTS, "hook_point": "blocks.3.hook_resid_pre", "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 7}, "normalize_activations": False, "finetuning_scaling_factor": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    sae = assert_as_expected(tmp_path, centre_input=False)
    assert sae.site == Site(3)
    assert read_sae(str(tmp_path), "any").centred


@pytest.mark.parametrize(("name", "layer"), [("layers.1", 1), ("model.layers.2", 2)])
def test_sparsify(sparsify, name, layer):
    assert assert_as_expected(sparsify / name).site == Site.post(layer)


def test_sparsify_refusals(sparsify, tmp_path):
    with pytest.raises(UndertowError, match="is of a transcoder"):
        read_sae(str(sparsify / "transcoder" / "layers.1"), "any")
    (sparsify / "layers.1").rename(tmp_path / "layers.1.mlp")
    with pytest.raises(UndertowError, match=r"layers\.1\.mlp is not of the residual stream"):
        read_sae(str(tmp_path / "layers.1.mlp"), "any")
    (tmp_path / "layers.1.mlp").rename(sparsify / "layers.1")


DICTIONARIES = [
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
]  # fmt: skip


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning(dictionary_learning, name):
    """Its pickle is refused; the command in the message converts it; what comes out encodes and decodes as the library."""
    folder = dictionary_learning / name
    with pytest.raises(UndertowError, match="undertow does not read pickles") as refusal:
        read_sae(str(folder), "any")
    command = shlex.split(re.search(r"try again: (.*)", str(refusal.value))[1])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert assert_as_expected(folder).site == Site.post(1)


def test_transformer_lens_weights(tmp_path):
    """An SAE of TransformerLens's processed GPT-2 reads the raw weights' stream: centred, and as its config says so itself."""
    out = written_by("transformer-lens", tmp_path)
    expected = load_file(out / "expected.safetensors")
    model = LanguageModel.wrap(AutoModelForCausalLM.from_pretrained(out / "model"))
    sae = read_sae(str(out / "sae"), "any")
    assert sae.centred
    recorder = Recorder(sae.site)
    run(model, Batch.of(expected["ids"].tolist(), set()), [recorder.edit])
    raw = recorder.states
    assert not torch.allclose(raw, expected["stream"], atol=1e-2)
    assert torch.allclose(sae.target(raw), expected["stream"], atol=1e-4)
    assert torch.allclose(sae.encode(raw), expected["z"], atol=1e-4)
    assert torch.allclose(sae.decode(sae.encode(raw), raw), expected["h_hat"], atol=1e-4)
    features = sae.features([0, 1])
    clamped = Clamp(features, "zero", skip_special=False, keep_error=False).apply(raw, Where(-9, *[torch.ones(4, 9) > 0] * 2))
    wanted = expected["h_hat"] - expected["z"][..., :2] @ sae.W_dec[:2] + raw.mean(-1, keepdim=True)
    assert torch.allclose(clamped, wanted, atol=1e-4), "the stream's mean, which the SAE does not see, stays"


def scope_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, D), "b_dec": (D,), "threshold": (LATENTS,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_gemma_scope(tmp_path, second, compressed):
    t = scope_tensors()
    if second:
        folder = tmp_path / "gemma-scope-2-1b-pt" / "resid_post" / "layer_12_width_16k_l0_small"
        folder.mkdir(parents=True)
        save_file({name.lower(): tensor for name, tensor in t.items()}, folder / "params.safetensors")
        if compressed:
            hook = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.12.output"}
            (folder / "config.json").write_text(json.dumps(hook))
    else:
        folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_71"
        folder.mkdir(parents=True)
        (np.savez_compressed if compressed else np.savez)(folder / "params.npz", **{n: x.numpy() for n, x in t.items()})
    h = torch.randn(9, D)
    pre = h @ t["W_enc"] + t["b_enc"]
    z = torch.where(pre > t["threshold"], pre.relu(), 0.0)
    save_file({"h": h, "z": z, "h_hat": z @ t["W_dec"] + t["b_dec"]}, folder / "expected.safetensors")
    sae = assert_as_expected(folder)
    assert (sae.site, sae.prepend_bos) == (Site.post(12), True)


@pytest.mark.parametrize(
    "place", ["gemma-scope-2b-pt-att/layer_3/width_16k", "gemma-scope-2-1b-pt/transcoder_all/layer_3", "x/mlp_out/layer_3"]
)
def test_gemma_scope_of_other_places_is_refused(tmp_path, place):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: x.numpy() for n, x in scope_tensors().items()})
    with pytest.raises(UndertowError, match="is not of the residual stream"):
        read_sae(str(folder), "any")


@pytest.mark.parametrize(
    ("trainer", "site"),
    [
        ({"submodule_name": "resid_pre_layer_1"}, Site(1)),
        ({"submodule_name": "resid_mid_layer_1"}, None),
        ({"layer": "1"}, None),
    ],
)
def test_dictionary_learning_of_other_places(dictionary_learning, tmp_path, trainer, site):
    """`pre` is not read as `post`, and what lies between is refused."""
    weights = load_file(dictionary_learning / "JumpReluAutoEncoder" / "expected.safetensors")
    assert weights
    config = json.loads((dictionary_learning / "AutoEncoderNew" / "config.json").read_text())
    config["trainer"].update(trainer)
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (LATENTS, D), "encoder.bias": (LATENTS,), "decoder.weight": (D, LATENTS), "decoder.bias": (D,)}
    save_file({n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}, tmp_path / "ae.safetensors")
    if site:
        assert read_sae(str(tmp_path), "any").site == site
    else:
        with pytest.raises(UndertowError, match="is no place of the residual stream that is known"):
            read_sae(str(tmp_path), "any")


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        ({"hf_hook_point_in": "model.layers.7.output"}, {}, "config.json says model.layers.7.output, the path layer 12"),
        ({"affine_connection": True}, {}, "affine_connection is True"),
        ({"hf_hook_point_in": "model.layers.12.output", "hf_hook_point_out": "x"}, {}, "hf_hook_point_out is 'x'"),
        ({}, {"affine_skip_connection": torch.zeros(D, D)}, "also holds affine_skip_connection"),
    ],
)
def test_gemma_scope_2_that_contradicts_itself(tmp_path, config, extra, message):
    folder = tmp_path / "my-mlp-project" / "gemma-scope-2-1b-pt" / "resid_post" / "layer_12_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file({**{n.lower(): x for n, x in scope_tensors().items()}, **extra}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UndertowError, match=message):
        read_sae(str(folder), "any")


# Files from anyone


def test_the_file_that_was_named_is_the_one_that_is_read(sae_lens, tmp_path):
    for file in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / file).write_bytes((sae_lens / "standard" / file).read_bytes())
    assert read_sae(str(tmp_path / "sae_weights.safetensors"), "any").source["format"] == "saelens"
    with pytest.raises(UndertowError, match="cfg.json is no weights file that is known"):
        read_sae(str(tmp_path / "cfg.json"), "any")
    (tmp_path / "WEIGHTS.PT").write_bytes(b"")
    with pytest.raises(UndertowError, match="does not read pickles"):
        read_sae(str(tmp_path / "WEIGHTS.PT"), "any")
    (tmp_path / "ae.safetensors").write_bytes(b"")
    with pytest.raises(UndertowError, match="holds weights in several formats"):
        read_sae(str(tmp_path), "any")


def test_the_fingerprint_covers_the_configuration(sae_lens, tmp_path):
    """A run is not continued, nor its verdict repeated, when the SAE's configuration has changed under it."""
    for file in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / file).write_bytes((sae_lens / "topk" / file).read_bytes())
    before = sae_fingerprint(str(tmp_path), "any")
    assert sae_fingerprint(str(tmp_path), "any") == before
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "k": 8}))
    assert sae_fingerprint(str(tmp_path), "any") != before


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": []}, {"metadata": "x"}, {"metadata": {"hook_name": 5}}, {"metadata": {"hook_name": ["a"]}},
        {"metadata": {"model_from_pretrained_kwargs": "x"}}, {"k": 10**30}, {"k": 97}, {"k": -1}, {"k": None}, {"d_in": None},
        {"d_sae": 9.5}, {"d_in": -32}, {"d_in": True}, {"apply_b_dec_to_input": "false"}, {"normalize_activations": {}},
        {"rescale_acts_by_decoder_norm": "false"}, {"architecture": ["topk"]}, {"reshape_activations": 3},
    ],
)  # fmt: skip
def test_wrong_types_in_a_configuration_are_one_line(sae_lens, tmp_path, changes):
    for file in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / file).write_bytes((sae_lens / "topk" / file).read_bytes())
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UndertowError):
        read_sae(str(tmp_path), "any")


@pytest.mark.parametrize("limit", ["abc", [1], -3.0, float("nan")])
def test_a_norm_limit_is_a_positive_number(sae_lens, tmp_path, limit):
    for file in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / file).write_bytes((sae_lens / "topk" / file).read_bytes())
    (tmp_path / "card.json").write_text(json.dumps({"norm_limit": limit}))
    with pytest.raises(UndertowError, match="norm_limit is"):
        read_sae(str(tmp_path), "any")


def test_damaged_archives_are_one_line(tmp_path):
    """Random damage to a compressed archive makes the libraries raise all sorts of things; users see one."""
    np.savez_compressed(tmp_path / "good.npz", **{n: x.numpy() for n, x in scope_tensors().items()})
    good = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "good.npz").unlink()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        for place in rng.integers(0, len(good), 4):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "params.npz").write_bytes(bytes(damaged))
        try:
            read_sae(str(tmp_path), "any", site="blocks.1.hook_resid_post")
        except UndertowError:
            refused += 1
    assert refused > 50


def test_pickled_weights_are_never_opened(tmp_path):
    """E7: neither as a file nor as what lies in a folder; the bytes are not even looked at."""
    for name in ("ae.pt", "sae.pkl", "model.bin"):
        (tmp_path / name).write_bytes(b"\x80\x05cos\nsystem\n")
        with pytest.raises(UndertowError, match="undertow does not read pickles"):
            read_sae(str(tmp_path / name), "any")
        with pytest.raises(UndertowError, match="undertow does not read pickles"):
            read_sae(str(tmp_path), "any")
        (tmp_path / name).unlink()
    with pytest.raises(UndertowError, match=r"holds no SAE weights that are known\. Known are: ae\.safetensors"):
        read_sae(str(tmp_path), "any")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UndertowError, match="holds object, not numbers"):
        read_sae(str(tmp_path), "any", site="blocks.1.hook_resid_post")


def test_an_archive_that_claims_more_than_it_holds_allocates_nothing(tmp_path, monkeypatch):
    """A compressed bomb, and a header whose shape is not that of the data."""
    import io
    import zipfile

    monkeypatch.setattr("undertow.saes.files.SMALL", 1 << 16)
    np.savez_compressed(tmp_path / "params.npz", W_enc=np.zeros((4096, 1024), dtype=np.float32))
    with pytest.raises(UndertowError, match="claims 16777344 bytes and is stored in"):
        read_sae(str(tmp_path), "any")
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)})
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", member.getvalue() + b"\0" * 64)
    with pytest.raises(UndertowError, match="is not what the archive holds"):
        read_sae(str(tmp_path), "any")


@pytest.mark.parametrize("size", [0, 7, 8, 60, 2000])
@pytest.mark.parametrize("name", ["params.npz", "params.safetensors"])
def test_truncated_files(tmp_path, name, size):
    t = scope_tensors()
    if name.endswith("npz"):
        np.savez(tmp_path / name, **{n: x.numpy() for n, x in t.items()})
    else:
        save_file({n.lower(): x for n, x in t.items()}, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    with pytest.raises(UndertowError, match="cannot be read"):
        read_sae(str(tmp_path), "any", site="blocks.1.hook_resid_post")


def test_a_header_longer_than_the_file(tmp_path):
    (tmp_path / "params.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(UndertowError, match="cannot be read"):
        read_sae(str(tmp_path), "any")


# Addresses


REGISTRY = """\
other-release:
  repo_id: someone/else
  saes:
  - id: a
    path: b
tiny-res-jb:
  config_overrides:
    normalize_activations: constant_norm_rescale
  repo_id: someone/tiny-saes
  saes:
  - id: blocks.1.hook_resid_pre
    neuronpedia: tiny/1-res-jb
    norm_scaling_factor: 0.5
    path: folder/blocks.1
"""


def test_a_release_of_sae_lens_means_a_folder_on_the_hub(sae_lens, tmp_path, monkeypatch):
    """Only the list of releases is read; the files are found in the hub's cache, offline."""
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    monkeypatch.setattr(load, "_registry_file", lambda: tmp_path / "registry.yaml")
    load._release_names.cache_clear()
    fetched = []

    def download(repository, revision, allow_patterns):
        fetched.append((repository, revision))
        assert "folder/blocks.1/cfg.json" in allow_patterns
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "blocks.1").symlink_to(sae_lens / "standard")
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    try:
        sae = read_sae("tiny-res-jb/blocks.1.hook_resid_pre", "any", revision="v2")
        assert fetched == [("someone/tiny-saes", "v2")]
        assert sae.neuronpedia == "tiny/1-res-jb"
        assert isinstance(sae.normaliser, ConstantNorm), "what the release says of the configuration counts"
        # The release's scale is for SAEs whose files leave it open; this one's do not.
        assert torch.allclose(sae.W_dec, read_sae(str(sae_lens / "standard"), "any").W_dec)
        with pytest.raises(UndertowError, match="release tiny-res-jb has no SAE 'z'"):
            read_sae("tiny-res-jb/z", "any")
    finally:
        load._release_names.cache_clear()


def test_an_sae_on_the_hub_is_found_in_its_cache_offline(sae_lens, tmp_path, monkeypatch):
    """The real hub library, offline, on a cache folder laid out as it lays it out."""
    repository = tmp_path / "hub" / "models--org--saes"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "deep").symlink_to(sae_lens / "jumprelu")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import huggingface_hub

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path / "hub", **k))
    assert read_sae("org/saes/deep", "any").source["format"] == "saelens"
    with pytest.raises(UndertowError, match="'org/none/deep' cannot be fetched from the hub"):
        read_sae("org/none/deep", "any")


def test_the_real_registry_of_sae_lens():
    if importlib.util.find_spec("sae_lens") is None:
        pytest.skip("sae-lens is not installed")
    located = load._locate("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert located.on_hub == ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre")
    assert located.config["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert located.known.neuronpedia == "gpt2-small/8-res-jb"
