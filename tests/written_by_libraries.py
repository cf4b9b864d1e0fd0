"""Write SAEs with the libraries that people train them with, and what these libraries encode and decode with them.

    python tests/written_by_libraries.py OUT LIBRARY

Run in a process of its own, because these libraries bring much with them. In each folder below OUT: the files as the library
writes them, and `expected.safetensors` with inputs `h`, latents `z` and reconstructions `h_hat` as the library computes them.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

D, LATENTS, K = 32, 96, 7


def inputs() -> torch.Tensor:
    """Rows of different size and with a mean, so that scaling and centring matter."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(24, D, generator=generator) * torch.linspace(0.5, 3, 24)[:, None]
    return rows + torch.linspace(-1, 2, D)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every parameter random, decoder and encoder unrelated, decoder rows of different norm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            positive = "threshold" in name
            parameter.copy_(0.3 * (drawn.abs() if positive else drawn) * (1 + torch.rand(parameter.shape, generator=generator)))


def expect(folder: Path, encode, decode) -> None:
    """Store what the library computes."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        h = inputs()
        z = encode(h)
        h_hat = decode(z)
    save_file({"h": h, "z": z.contiguous(), "h_hat": h_hat.contiguous()}, folder / "expected.safetensors")


def sae_lens(out: Path) -> None:
    """All architectures that SAELens saves, and every run-time normalisation with each that differs."""
    import sae_lens as lib
    from sae_lens.saes.sae import SAEMetadata

    def metadata():
        return SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post", prepend_bos=True, neuronpedia_id="tiny/1-x")

    common = {"d_in": D, "d_sae": LATENTS}
    plain = {
        "standard": (lib.StandardSAE, lib.StandardSAEConfig, {}),
        "standard-raw-input": (lib.StandardSAE, lib.StandardSAEConfig, {"apply_b_dec_to_input": False}),
        "gated": (lib.GatedSAE, lib.GatedSAEConfig, {}),
        "jumprelu": (lib.JumpReLUSAE, lib.JumpReLUSAEConfig, {}),
        "topk": (lib.TopKSAE, lib.TopKSAEConfig, {"k": K}),
        "topk-rescaled": (lib.TopKSAE, lib.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    }
    for normalisation in ("layer_norm", "constant_norm_rescale"):
        for name in ("standard", "gated", "topk"):
            cls, config, extra = plain[name]
            plain[f"{name}-{normalisation}"] = (cls, config, {**extra, "normalize_activations": normalisation})
    for seed, (name, (cls, config, extra)) in enumerate(plain.items()):
        sae = cls(config(**common, **extra, metadata=metadata()))
        randomise(sae, seed)
        # The library keeps the statistics of the last input for decoding.
        expect(out / name, sae.encode, sae.decode)
        sae.save_model(out / name)

    training = {
        "batchtopk": (lib.BatchTopKTrainingSAE, lib.BatchTopKTrainingSAEConfig, {}),
        "matryoshka": (
            lib.MatryoshkaBatchTopKTrainingSAE, lib.MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": [24, 48]},
        ),
    }  # fmt: skip
    for seed, (name, (cls, config, extra)) in enumerate(training.items(), 100):
        sae = cls(config(**common, k=K, **extra, metadata=metadata()))
        randomise(sae, seed)
        sae.topk_threshold = torch.tensor(0.9, dtype=torch.float64)
        sae.save_inference_model(out / name)
        loaded = lib.SAE.load_from_disk(str(out / name))
        expect(out / name, loaded.encode, loaded.decode)
        # The checkpoint of the same SAE in training must mean the same.
        sae.save_model(out / f"{name}-checkpoint")
        expect(out / f"{name}-checkpoint", loaded.encode, loaded.decode)

    transcoder = lib.Transcoder(lib.TranscoderConfig(**common, d_out=D, apply_b_dec_to_input=False, metadata=metadata()))
    transcoder.save_model(out / "transcoder")

    config = lib.StandardSAEConfig(**common, normalize_activations="covariance_whitening", metadata=metadata())
    whitened = lib.StandardSAE(config)
    randomise(whitened, 50)
    whitened.save_model(out / "whitening-unfolded")
    matrix = torch.eye(D) + 0.1 * torch.randn(D, D, generator=torch.Generator().manual_seed(2))
    whitened.fold_activation_whitening(torch.linspace(-1, 1, D), matrix, torch.linalg.inv(matrix))
    expect(out / "whitening-folded", whitened.encode, whitened.decode)
    whitened.save_model(out / "whitening-folded")

    config = lib.StandardSAEConfig(**common, normalize_activations="expected_average_only_in", metadata=metadata())
    scaled = lib.StandardSAE(config)
    randomise(scaled, 51)
    scaled.save_model(out / "scale-unknown")
    scaled.fold_activation_norm_scaling_factor(0.4)
    expect(out / "scale-unknown", scaled.encode, scaled.decode)

    # A field that the library ignores for this architecture.
    flagged = lib.JumpReLUSAE(lib.JumpReLUSAEConfig(**common, metadata=metadata()))
    randomise(flagged, 52)
    flagged.save_model(out / "jumprelu-flagged")
    config = out / "jumprelu-flagged" / "cfg.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rescale_acts_by_decoder_norm": True}))
    loaded = lib.SAE.load_from_disk(str(config.parent))
    expect(config.parent, loaded.encode, loaded.decode)


def sparsify(out: Path) -> None:
    """A TopK SAE of sparsify."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    for name, config in {
        "layers.1": SparseCoderConfig(k=K, num_latents=LATENTS),
        "model.layers.2": SparseCoderConfig(k=K, expansion_factor=3, normalize_decoder=False),
    }.items():
        coder = SparseCoder(D, config)
        randomise(coder, 7)
        coder.save_to_disk(out / name)

        def encode(h, coder=coder):
            values, indices, _ = coder.encode(h)
            return torch.zeros(len(h), LATENTS).scatter(1, indices, values)

        def decode(z, coder=coder):
            values, indices = z.topk(K)
            return coder.decode(values, indices)

        expect(out / name, encode, decode)
    SparseCoder(D, SparseCoderConfig(k=K, num_latents=LATENTS, transcode=True)).save_to_disk(out / "transcoder" / "layers.1")


def dictionary_learning(out: Path) -> None:
    """Every class of dictionary; saved as the library does, as a pickle, and converted by the command undertow gives."""
    # Imported by the package's front door for training, and not needed for its dictionaries.
    for name in ("nnsight", "datasets"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["nnsight"].LanguageModel = object
    sys.modules["datasets"].load_dataset = None
    from dictionary_learning import dictionary as lib
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    jumprelu = lib.JumpReluAutoEncoder(D, LATENTS)
    jumprelu.apply_b_dec_to_input = False
    dictionaries = [
        lib.AutoEncoder(D, LATENTS), lib.AutoEncoderNew(D, LATENTS), lib.GatedAutoEncoder(D, LATENTS), jumprelu,
        AutoEncoderTopK(D, LATENTS, K), BatchTopKSAE(D, LATENTS, K), MatryoshkaBatchTopKSAE(D, LATENTS, K, [24, 72]),
    ]  # fmt: skip
    for seed, dictionary in enumerate(dictionaries):
        randomise(dictionary, seed)
        name = type(dictionary).__name__
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            dictionary.threshold.fill_(0.8)
        (out / name).mkdir(parents=True)
        torch.save(dictionary.state_dict(), out / name / "ae.pt")
        if name == "AutoEncoder":
            # The library's loader gives decoder rows unit norm, by default and for this class alone.
            dictionary = lib.AutoEncoder.from_pretrained(str(out / name / "ae.pt"))
        expect(out / name, dictionary.encode, dictionary.decode)
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": LATENTS, "k": K, "layer": 1, "lm_name": "tiny",
                   "submodule_name": "resid_post_layer_1"}  # fmt: skip
        (out / name / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))


def transformer_lens(out: Path) -> None:
    """A GPT-2 with TransformerLens's processed weights: its residual stream, and an SAE of SAELens on that stream."""
    import sae_lens as lib
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    vocabulary, layers, heads, context = 64, 3, 4, 32
    network = GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, n_embd=D, n_layer=layers, n_head=heads, n_positions=context, initializer_range=0.2)
    ).eval()
    randomise(network, 3)
    network.save_pretrained(out / "model")
    config = HookedTransformerConfig(
        n_layers=layers, d_model=D, n_ctx=context, d_head=D // heads, n_heads=heads, d_mlp=4 * D, d_vocab=vocabulary,
        act_fn="gelu_new", normalization_type="LN", eps=1e-5, original_architecture="GPT2LMHeadModel", device="cpu",
    )  # fmt: skip
    processed = HookedTransformer(config)
    processed.load_and_process_state_dict(
        convert_gpt2_weights(network, config), fold_ln=True, center_writing_weights=True, center_unembed=True,
        fold_value_biases=True,
    )  # fmt: skip
    ids = torch.randint(0, vocabulary, (4, 9), generator=torch.Generator().manual_seed(1))
    site = "blocks.2.hook_resid_pre"
    with torch.no_grad():
        stream = processed.run_with_cache(ids, names_filter=[site])[1][site]
    metadata = lib.saes.sae.SAEMetadata(hook_name=site, model_from_pretrained_kwargs={"center_writing_weights": True})
    sae = lib.StandardSAE(lib.StandardSAEConfig(d_in=D, d_sae=LATENTS, metadata=metadata))
    randomise(sae, 4)
    sae.save_model(out / "sae")
    with torch.no_grad():
        z = sae.encode(stream)
        expected = {"ids": ids, "stream": stream, "z": z, "h_hat": sae.decode(z)}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, out / "expected.safetensors")


LIBRARIES = {
    "sae-lens": sae_lens, "eai-sparsify": sparsify, "dictionary-learning": dictionary_learning,
    "transformer-lens": transformer_lens,
}  # fmt: skip

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    LIBRARIES[sys.argv[2]](Path(sys.argv[1]))
