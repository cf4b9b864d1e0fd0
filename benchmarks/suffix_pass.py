"""One optimisation step of the suffix pass against the plain hook way, in one run on one machine.

    python benchmarks/suffix_pass.py [--lengths 15,64,128,256] [--batch 128] [--threads 2]

A step is: add a perturbation to the last position of the residual stream at half depth of SmolLM2-135M, compute a logit
difference there, and get the perturbation's gradient. Three ways:

- suffix: `SuffixPass`, blocks above the site, last column only, two rows of the unembedding;
- frozen: a hook on the whole model, all positions and all logits, weights frozen;
- published: the same with weights that require gradients, as the published code runs it.

The plain ways take as many prompts at once as make `PLAIN_TOKENS` tokens (all of them at 15 tokens), because a whole batch
of long prompts does not fit in memory; their seconds are multiplied up to the whole batch, whose pieces do not depend on
each other. Each way is timed by itself, the median of equally many calls. The gradients are compared. The share of the
machine's matrix-multiply rate divides the multiplications of a suffix step (forward and backward through the weights of
the blocks above the site) by what `torch.mm` does in the same run, once for a large square product and once for products
of the pass's own shapes with weights that are not in the cache.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from undertow.behaviours.logit_difference import LogitDifference
from undertow.models.batch import Batch
from undertow.models.load import load_model
from undertow.models.perturbation import Slot, perturbation_edits
from undertow.models.suffix import SuffixPass
from undertow.sites import Site

PLAIN_TOKENS = 2048


def median_seconds(step: Callable[[], object], repeats: int) -> float:
    """Median seconds of some calls in a row, after one that is not counted."""
    step()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matmul_rates(model, rows: int, layers: list) -> tuple[float, float]:
    """FLOP/s of a large square product, and of the pass's own products with weights cycled through memory."""
    square = torch.randn(2048, 2048)
    large = 2 * 2048**3 / median_seconds(lambda: square @ square, 9)
    weights = [w.detach() for layer in layers for w in layer.parameters() if w.ndim == 2]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
    outputs = {w.shape[0]: torch.randn(rows, w.shape[0]) for w in weights}

    def cycle():
        for w in weights:
            inputs[w.shape[1]] @ w.T
        for w in weights:
            outputs[w.shape[0]] @ w

    own = 4 * rows * sum(w.numel() for w in weights) / median_seconds(cycle, 9)
    return large, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", default="15,64,128,256")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    site, slots = Site(model.n_layers // 2), (Slot(Site(model.n_layers // 2), -1),)
    above = list(model.layers[site.boundary :])
    large, own = matmul_rates(model, args.batch, above)
    flops = 4 * args.batch * sum(p.numel() for layer in above for p in layer.parameters() if p.ndim == 2)
    print(f"{args.batch} prompts, site {site}, {args.threads} threads, torch {torch.__version__}")
    print(f"matmul rate: large {large / 1e9:.0f} GFLOP/s, the pass's own shapes {own / 1e9:.0f} GFLOP/s\n")
    header = ("tokens", "suffix s", "frozen s", "published s", "x frozen", "x published", "of large", "of own", "grad err")
    print("".join(f"{name:>12}" for name in header))
    results = []
    for length in map(int, args.lengths.split(",")):
        generator = torch.Generator().manual_seed(length)
        batch = Batch.of(torch.randint(100, 40000, (args.batch, length), generator=generator).tolist(), set())
        score = LogitDifference(batch.ids[:, 0], batch.ids[:, 1])
        rows = torch.arange(args.batch)
        start = torch.randn(args.batch, 1, model.d_model, generator=generator)
        suffix = SuffixPass(model, batch, site)

        def fast(suffix=suffix, score=score, rows=rows, start=start):
            delta = start.clone().requires_grad_()
            value = score.value(model, suffix(after=perturbation_edits(slots, delta)), rows)
            return torch.autograd.grad(value.sum(), delta)[0]

        few = min(args.batch, max(1, PLAIN_TOKENS // length))

        def plain(batch=batch.select(range(few)), rows=rows[:few], start=start[:few]):
            delta = start.clone().requires_grad_()

            def hook(module, inputs, output):
                stream = (output[0] if isinstance(output, tuple) else output).clone()
                stream[:, -1] += delta[:, 0]
                return (stream, *output[1:]) if isinstance(output, tuple) else stream

            handle = model.layers[site.boundary - 1].register_forward_hook(hook)
            logits = model.network(batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits[:, -1]
            handle.remove()
            (logits[rows, batch.ids[:, 0]] - logits[rows, batch.ids[:, 1]]).sum().backward()
            model.network.zero_grad(set_to_none=True)
            return delta.grad

        reference = plain()
        error = float((fast()[:few] - reference).norm() / reference.norm())

        times = args.batch / few
        seconds = {"suffix": median_seconds(fast, args.repeats), "frozen": times * median_seconds(plain, args.repeats)}
        model.network.requires_grad_(True)
        seconds["published"] = times * median_seconds(plain, args.repeats)
        model.network.requires_grad_(False)
        row = {
            "tokens": length, **{f"{name}_seconds": round(value, 4) for name, value in seconds.items()},
            "ratio_frozen": round(seconds["frozen"] / seconds["suffix"], 1),
            "ratio_published": round(seconds["published"] / seconds["suffix"], 1),
            "share_of_large_matmul": round(flops / seconds["suffix"] / large, 3),
            "share_of_own_matmul": round(flops / seconds["suffix"] / own, 3), "gradient_error": error,
        }  # fmt: skip
        results.append(row)
        print("".join(f"{value:>12.4g}" for value in row.values()), flush=True)
    summary = {
        "benchmark": "suffix_pass", "batch": args.batch, "threads": args.threads, "matmul_gflops": round(large / 1e9, 1),
        "own_matmul_gflops": round(own / 1e9, 1), "rows": results,
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
