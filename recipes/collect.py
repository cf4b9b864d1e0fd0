"""Step 1 of the SAE recipe: residual-stream activations of real text, at several depths in one pass.

    python recipes/collect.py --out ACTS --layers 9 15 21 --tokens 4000000

What is kept, and why (SmolLM2 has massive activations: 0.02 % of positions hold most of the raw variance):
1. each text alone, cut into windows of 128 tokens, each of which starts with a BOS where the tokenizer adds one; texts are
   never joined, so no window attends across documents;
2. the first position of every window is left out: it is an attention sink with a norm far above the median;
3. so is every position whose norm is over `NORM_FACTOR` times the median norm of the site, or more than float16 holds
   (`norm_limit` in the card); the SAE has nothing to say there, and undertow's clamps leave such positions alone;
4. rows are stored raw, in float16, in the order in which they come; training shuffles them.

The network runs under bfloat16 autocast (weights float32, residual stream float32): matrix products are rounded, the stream
is not. Evaluation (`undertow check`) runs in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from undertow.models.batch import token_windows
from undertow.models.packaged import PACKAGED_MODELS, packaged_folder
from undertow.texts import corpus_texts

WINDOW, MIN_WINDOW, NORM_FACTOR, BATCH_TOKENS = 128, 12, 5.0, 2048


def windows(texts: list[str], tokenizer, batch_texts: int = 2000):
    """Yield lists of token windows of similar length, each list at most BATCH_TOKENS tokens when padded."""
    for start in range(0, len(texts), batch_texts):
        pieces = []
        for ids in tokenizer(texts[start : start + batch_texts])["input_ids"]:
            pieces += token_windows(ids, WINDOW, tokenizer.bos_token_id)
        pieces = sorted((piece for piece in pieces if len(piece) >= MIN_WINDOW), key=len)
        order, batch = [], []
        for piece in pieces:
            if (len(batch) + 1) * len(piece) > BATCH_TOKENS:
                order.append(batch)
                batch = []
            batch.append(piece)
        order.append(batch)
        for index in np.random.default_rng(start).permutation(len(order)):
            if order[index]:
                yield order[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="packaged name, hub id or folder")
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 15, 21], help="blocks.L.hook_resid_post")
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    folder = packaged_folder(PACKAGED_MODELS[args.model]) if args.model in PACKAGED_MODELS else args.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stack = model.get_decoder()
    # Nothing above the highest site is needed.
    stack.layers = stack.layers[: max(args.layers) + 1]
    stack.config.num_hidden_layers = len(stack.layers)
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        return lambda module, inputs, output: seen.__setitem__(layer, output[0] if isinstance(output, tuple) else output)

    for layer in args.layers:
        stack.layers[layer].register_forward_hook(keep(layer))

    width = model.config.hidden_size
    stores = {
        layer: np.lib.format.open_memmap(
            args.out / f"layer{layer}.npy", mode="w+", dtype=np.float16, shape=(args.tokens, width)
        )
        for layer in args.layers
    }
    limits: dict[int, float] = {}
    filled = tokens = massive = 0
    began = time.time()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for step, batch in enumerate(windows(corpus_texts("train"), tokenizer)):
            length = len(batch[-1])
            ids = torch.full((len(batch), length), tokenizer.pad_token_id)
            mask = torch.zeros(ids.shape, dtype=torch.bool)
            for row, piece in enumerate(batch):
                ids[row, : len(piece)] = torch.tensor(piece)
                mask[row, : len(piece)] = True
            stack(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            mask[:, 0] = False
            rows = {layer: seen[layer].float()[mask] for layer in args.layers}
            norms = {layer: rows[layer].norm(dim=-1) for layer in args.layers}
            for layer in args.layers:
                limits.setdefault(layer, min(NORM_FACTOR * norms[layer].median().item(), float(np.finfo(np.float16).max)))
            ordinary = torch.stack([norms[layer] <= limits[layer] for layer in args.layers]).all(0)
            massive += int((~ordinary).sum())
            tokens += len(ordinary)
            take = min(int(ordinary.sum()), args.tokens - filled)
            for layer in args.layers:
                stores[layer][filled : filled + take] = rows[layer][ordinary][:take].half().numpy()
            filled += take
            if step % 100 == 0:
                print(f"{filled}/{args.tokens} rows, {filled / (time.time() - began):.0f} rows/s", flush=True)
            if filled == args.tokens:
                break
    for store in stores.values():
        store.flush()
    facts = {
        "model": args.model, "layers": args.layers, "rows": filled, "massive_left_out": massive, "window": WINDOW,
        "positions_seen": tokens, "norm_limit": limits, "norm_factor": NORM_FACTOR, "seconds": time.time() - began,
        "prepend_bos": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
    }  # fmt: skip
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
