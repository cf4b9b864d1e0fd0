"""Step 2 of the SAE recipe: a BatchTopK SAE on the collected activations, saved as JumpReLU in SAELens's folder format.

    python recipes/train.py --acts ACTS --layer 15 --out SAE_FOLDER --tokens 5000000

sae-lens's own trainer (`SAETrainer`, `BatchTopKTrainingSAE`), fed from the stored rows:
1. the mean row is subtracted (of ordinary positions; massive ones were left out by collect.py) and the rest scaled by one
   number so that its mean square is 1; in Gemma the mean alone is nine tenths of the raw square;
2. BatchTopK with an auxiliary loss for dead latents, Adam, learning rate decayed to zero over the last fifth;
3. mean and scale are folded into the weights: the saved SAE reads the raw residual stream, and its latents are in the
   stream's own units (decoder rows of unit norm);
4. weights are saved in float16 (biases and threshold in float32), after which `undertow check --write-card` measures
   the saved files on held-out text. Nothing in the card comes from training.

Training stops after `--tokens` rows (re-using stored rows in new orders when that is more than there are), so a longer run is a
larger number; the learning-rate schedule is stretched with it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# 1: the packaged SAEs of SmolLM2, trained without 1.'s subtraction of the mean.
RECIPE_VERSION = 2


def batches(rows: np.ndarray, mean: torch.Tensor, scale: float, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches [size, d_model]: each epoch is a new permutation of all rows."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order) - size + 1, size):
            yield (torch.from_numpy(rows[np.sort(order[start : start + size])]).float() - mean) * scale


def train(rows: np.ndarray, args: argparse.Namespace):
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sample = torch.from_numpy(rows[:: max(1, len(rows) // 100_000)]).float()
    mean = sample.mean(0)
    scale = 1 / (sample - mean).square().mean().sqrt().item()
    torch.manual_seed(args.seed)
    config = BatchTopKTrainingSAEConfig(
        d_in=rows.shape[1], d_sae=args.width, k=args.k, dtype="float32", device="cpu",
        decoder_init_norm=0.1, aux_loss_coefficient=1.0, rescale_acts_by_decoder_norm=True,
    )  # fmt: skip
    sae = BatchTopKTrainingSAE(config)
    steps = args.tokens // args.batch
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=args.tokens, train_batch_size_samples=args.batch, lr=args.lr, lr_end=args.lr / 100,
            lr_warm_up_steps=min(200, steps // 10), lr_decay_steps=steps // 5, autocast=True, dead_feature_window=300,
        ),
        sae, batches(rows, mean, scale, args.batch, args.seed),
    )  # fmt: skip
    trainer.fit()
    assert sae.cfg.apply_b_dec_to_input
    sae.fold_activation_norm_scaling_factor(scale)
    sae.b_dec.data += mean
    return sae


def save(sae, args: argparse.Namespace, facts: dict, seconds: float) -> None:
    """Write cfg.json, sae_weights.safetensors and the training half of card.json."""
    state = sae.state_dict()
    sae.process_state_dict_for_saving_inference(state)
    halves = {"W_enc", "W_dec"}
    tensors = {
        name: tensor.to(torch.float16 if name in halves else torch.float32).contiguous() for name, tensor in state.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out / "sae_weights.safetensors")
    hook = f"blocks.{args.layer}.hook_resid_post"
    config = {
        "architecture": "jumprelu", "d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": facts["model"], "hook_name": hook, "hook_head_index": None, "prepend_bos": facts["prepend_bos"],
            "context_size": facts["window"],
        },
    }  # fmt: skip
    (args.out / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
    card = {
        "recipe": {
            "version": RECIPE_VERSION, "trainer": "sae-lens SAETrainer, BatchTopK saved as JumpReLU", "k": args.k,
            "text": "sae-probes 0.4.2, training split", "rows_stored": facts["rows"], "rows_trained": args.tokens,
            "batch": args.batch, "learning_rate": args.lr, "seed": args.seed, "minutes": round(seconds / 60, 1),
            "window": facts["window"], "first_position": "left out", "massive_left_out": facts["massive_left_out"],
        },
        "model": facts["model"], "site": hook, "width": sae.cfg.d_sae,
        "norm_limit": facts["norm_limit"][str(args.layer)],
    }  # fmt: skip
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", type=Path, required=True, help="folder written by collect.py")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="rows to train on, repeats included")
    parser.add_argument("--width", type=int, default=4608)
    parser.add_argument("--k", type=float, default=60)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = json.loads((args.acts / "facts.json").read_text())
    # The store has room for all rows that were asked for; the text may have held fewer.
    rows = np.load(args.acts / f"layer{args.layer}.npy", mmap_mode="r")[: facts["rows"]]
    # One row that overflowed would turn every weight into NaN, half an hour later.
    if not all(np.isfinite(rows[start : start + 100_000]).all() for start in range(0, len(rows), 100_000)):
        raise SystemExit(f"layer {args.layer}: some stored rows are not finite; collect them again")
    began = time.time()
    sae = train(rows, args)
    save(sae, args, facts, time.time() - began)


if __name__ == "__main__":
    main()
