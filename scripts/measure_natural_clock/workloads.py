"""What is timed: MoE layers with random weights, their neighbors, and whole chains of layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .kernels import grouped_gemm_kernel
from .routing import draw_choices, lay_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CHAIN_LAYERS = 6
_COPIES = 3  # weights of so many layers take turns: more than the L2 cache holds
_CHAIN_CONTEXT = 2048
_SMALL_KERNELS = 12
_CLOSE = 0.03  # largest relative error of the grouped GEMM that is taken as right


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of one MoE model's layers, as its config.json gives them."""

    name: str
    hidden: int
    width: int
    experts: int
    experts_per_token: int
    heads: int
    kv_heads: int
    head_width: int


MODELS = (
    ModelShape("qwen3-30b-a3b", 2048, 768, 128, 8, 32, 4, 128),
    ModelShape("gpt-oss-20b", 2880, 2880, 32, 4, 64, 8, 64),
    ModelShape("olmoe-1b-7b", 2048, 1024, 64, 8, 16, 16, 128),
)
DECODE_TOKENS = (1, 8, 32, 128)
PREFILL_TOKENS = (1024, 4096)
CHAIN_TOKENS = (8, 64)
_ATTENTION_SHAPES = ((16, 2048), (64, 8192))
_GEMM_ROWS = (16, 256, 4096)
#: Workloads in all: the gap, small kernels and the copy, then shapes and models.
WORKLOADS_COUNT = (
    3
    + len(_ATTENTION_SHAPES)
    + len(_GEMM_ROWS)
    + len(MODELS) * (len(DECODE_TOKENS) + len(PREFILL_TOKENS) + len(CHAIN_TOKENS))
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Something to time; `run(i)` launches it for the i-th time, on other weights each time."""

    name: str
    kind: str
    backend: str
    run: Callable[[int], object]


class Layers:
    """MoE layers of one model, bf16, random weights.

    Args:
        torch: The module.
        shape: The model.
        count: Layers.
        grouped: Whether the grouped GEMM kernel is used; otherwise cuBLAS' batched GEMM, with
            tokens spread evenly over the experts that are active.
    """

    def __init__(self, torch: Any, shape: ModelShape, count: int, *, grouped: bool) -> None:  # noqa: ANN401
        self._torch, self.shape, self._count, self._grouped = torch, shape, count, grouped
        hidden, width, experts = shape.hidden, shape.width, shape.experts
        self._router = self._weights(count, hidden, experts)
        self._up = self._weights(count, experts, 2 * width, hidden)
        self._down = self._weights(count, experts, hidden, width)

    @property
    def backend(self) -> str:
        """What computes the experts."""
        return "triton-grouped" if self._grouped else "cublas-batched"

    def moe(self, tokens: int) -> Callable[[int, Any], Any]:
        """The layer for so many tokens: `layer(i, x)` gives its output, (tokens, hidden)."""
        shape, torch = self.shape, self._torch
        choices = draw_choices(tokens, shape.experts, shape.experts_per_token, seed=tokens)
        block = 16 if tokens <= 256 else 64
        layout = lay_out(choices, block)
        pairs = choices.size
        rows = torch.from_numpy(layout.pair_of_row).cuda()
        experts = torch.from_numpy(layout.expert_of_block).cuda()
        active = layout.active_experts_count
        per_expert = -(-pairs // active)
        gate = torch.full((tokens, shape.experts_per_token, 1), 0.1, dtype=torch.bfloat16)
        gate = gate.cuda()

        def route(index: int, x: Any) -> None:  # noqa: ANN401
            logits = torch.mm(x, self._router[index % self._count])
            torch.topk(torch.softmax(logits, dim=-1), shape.experts_per_token)

        def grouped(index: int, x: Any) -> Any:  # noqa: ANN401
            route(index, x)
            layer = index % self._count
            both = self._multiply(x, self._up[layer], rows, experts, pairs, block)
            middle = _gated(torch, both, shape.width)
            out = self._multiply(middle, self._down[layer], rows, experts, pairs, block)
            return (out.view(tokens, -1, shape.hidden) * gate).sum(dim=1)

        def batched(index: int, x: Any) -> Any:  # noqa: ANN401
            route(index, x)
            layer = index % self._count
            spread = x.repeat(-(-active * per_expert // tokens), 1)[: active * per_expert]
            spread = spread.view(active, per_expert, shape.hidden)
            both = torch.bmm(spread, self._up[layer, :active].transpose(1, 2))
            out = torch.bmm(
                _gated(torch, both, shape.width), self._down[layer, :active].transpose(1, 2)
            )
            flat = out.view(-1, shape.hidden)[:pairs]
            return (flat.view(tokens, -1, shape.hidden) * gate).sum(dim=1)

        return grouped if self._grouped else batched

    def _multiply(  # noqa: PLR0917 - the kernel's own arguments
        self,
        x: Any,  # noqa: ANN401
        weights: Any,  # noqa: ANN401
        rows: Any,  # noqa: ANN401
        experts: Any,  # noqa: ANN401
        pairs: int,
        block: int,
    ) -> Any:  # noqa: ANN401
        _, columns, inner = weights.shape
        out = self._torch.empty((pairs, columns), dtype=self._torch.bfloat16, device="cuda")
        wide = block >= 64
        block_n = 128 if wide else 64
        grid = (-(-columns // block_n), experts.numel())
        grouped_gemm_kernel[grid](
            x,
            weights,
            out,
            rows,
            experts,
            pairs,
            columns,
            inner,
            PAIRS_PER_X_ROW=pairs // x.shape[0],
            BLOCK_M=block,
            BLOCK_N=block_n,
            BLOCK_K=64,
            num_warps=8 if wide else 4,
            num_stages=3 if wide else 4,
        )
        return out

    def _weights(self, *sizes: int) -> Any:  # noqa: ANN401
        return random_tensor(self._torch, *sizes)


def random_tensor(torch: Any, *sizes: int) -> Any:  # noqa: ANN401
    """Small normal numbers, bf16, on the GPU."""
    made = torch.empty(sizes, dtype=torch.bfloat16, device="cuda")
    return made.normal_(0.0, 0.02)


def _gated(torch: Any, both: Any, width: int) -> Any:  # noqa: ANN401
    return torch.nn.functional.silu(both[..., :width]) * both[..., width:]


def grouped_gemm_works(torch: Any) -> str:  # noqa: ANN401
    """Compare the grouped GEMM with plain products.

    Returns:
        Nothing when it is right, otherwise what is wrong.
    """
    shape = ModelShape("check", 128, 64, 8, 2, 1, 1, 64)
    try:
        for tokens in (5, 300):
            layers = Layers(torch, shape, 1, grouped=True)
            choices = draw_choices(tokens, shape.experts, shape.experts_per_token, seed=tokens)
            block = 16 if tokens <= 256 else 64
            layout = lay_out(choices, block)
            x = random_tensor(torch, tokens, shape.hidden)
            rows = torch.from_numpy(layout.pair_of_row).cuda()
            experts = torch.from_numpy(layout.expert_of_block).cuda()
            got = layers._multiply(x, layers._up[0], rows, experts, choices.size, block)  # noqa: SLF001
            chosen = torch.from_numpy(choices.reshape(-1)).cuda()
            source = x.repeat_interleave(shape.experts_per_token, dim=0).float()
            want = torch.einsum("pk,pnk->pn", source, layers._up[0][chosen].float())  # noqa: SLF001
            error = float((got.float() - want).norm() / want.norm())
            if not error < _CLOSE:
                return f"relative error {error:.3g} at {tokens} tokens"
    except Exception as error:  # noqa: BLE001 - whatever Triton meets, cuBLAS takes over
        return f"{type(error).__name__}: {error}"
    return ""


def workloads(torch: Any, *, grouped: bool) -> Iterator[Workload]:  # noqa: ANN401
    """Everything to time, one after the other; the memory of each model is freed after it."""
    yield from _neighbors(torch)
    for shape in MODELS:
        layers = Layers(torch, shape, _COPIES, grouped=grouped)
        for tokens in (*DECODE_TOKENS, *PREFILL_TOKENS):
            layer, x = layers.moe(tokens), random_tensor(torch, tokens, shape.hidden)
            run = functools.partial(_call, layer, x)
            yield Workload(f"{shape.name}/moe/{tokens}", "moe", layers.backend, run)
        del layers
        torch.cuda.empty_cache()
        yield from _chains(torch, shape, grouped=grouped)
        torch.cuda.empty_cache()


def _call(layer: Callable[[int, Any], Any], x: Any, index: int) -> None:  # noqa: ANN401
    layer(index, x)


def _neighbors(torch: Any) -> Iterator[Workload]:  # noqa: ANN401
    """Launch gap, launch-bound kernels, memory copies, attention reads and dense GEMM."""
    yield Workload("gap", "gap", "none", lambda _: None)
    a, b = random_tensor(torch, 64, 2048), random_tensor(torch, 64, 2048)

    def small(_: int) -> None:
        for _ in range(_SMALL_KERNELS // 2):
            torch.mul(a, 1.0001, out=b)
            torch.add(b, a, alpha=1e-6, out=a)

    yield Workload(f"small_kernels/{_SMALL_KERNELS}", "fixed", "torch", small)
    source = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    yield Workload("copy/256MiB", "memory", "torch", lambda _: target.copy_(source))
    for batch, context in _ATTENTION_SHAPES:
        attend = decode_attention(torch, MODELS[0], batch, context, copies=2)
        yield Workload(f"decode_attention/{batch}x{context}", "attention", "cublas-batched", attend)
        del attend
        torch.cuda.empty_cache()
    for rows in _GEMM_ROWS:
        x, w = random_tensor(torch, rows, 4096), random_tensor(torch, 4, 4096, 4096)
        run = functools.partial(_multiply_dense, torch, x, w)
        yield Workload(f"gemm/{rows}x4096x4096", "gemm", "cublas", run)


def _multiply_dense(torch: Any, x: Any, w: Any, index: int) -> None:  # noqa: ANN401
    torch.mm(x, w[index % len(w)])


def decode_attention(
    torch: Any,  # noqa: ANN401
    shape: ModelShape,
    batch: int,
    context: int,
    copies: int,
) -> Callable[[int], Any]:
    """One query per request over its keys and values; `attend(i)` uses the i-th copy of them."""
    rows, group, width = batch * shape.kv_heads, shape.heads // shape.kv_heads, shape.head_width
    keys = random_tensor(torch, copies, rows, width, context)
    values = random_tensor(torch, copies, rows, context, width)
    query = random_tensor(torch, rows, group, width)

    def attend(index: int) -> Any:  # noqa: ANN401
        scores = torch.softmax(torch.bmm(query, keys[index % copies]), dim=-1)
        return torch.bmm(scores, values[index % copies])

    return attend


def _chains(torch: Any, shape: ModelShape, *, grouped: bool) -> Iterator[Workload]:  # noqa: ANN401
    """Whole decode steps: norm, attention with its projections, router and experts, per layer."""
    layers = Layers(torch, shape, _CHAIN_LAYERS, grouped=grouped)
    queries, values = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    inward = random_tensor(torch, _CHAIN_LAYERS, shape.hidden, queries + 2 * values)
    outward = random_tensor(torch, _CHAIN_LAYERS, queries, shape.hidden)
    for tokens in CHAIN_TOKENS:
        moe = layers.moe(tokens)
        attend = decode_attention(torch, shape, tokens, _CHAIN_CONTEXT, copies=_CHAIN_LAYERS)
        start = random_tensor(torch, tokens, shape.hidden)
        step = functools.partial(_chain_step, torch, moe, attend, inward, outward, start)
        name = f"{shape.name}/chain{_CHAIN_LAYERS}/{tokens}"
        yield Workload(name, "chain", layers.backend, step)


def _chain_step(  # noqa: PLR0917 - what one step consists of
    torch: Any,  # noqa: ANN401
    moe: Callable[[int, Any], Any],
    attend: Callable[[int], Any],
    inward: Any,  # noqa: ANN401
    outward: Any,  # noqa: ANN401
    start: Any,  # noqa: ANN401
    _: int,
) -> None:
    x = start
    for layer in range(len(inward)):
        normed = _normed(torch, x)
        torch.mm(normed, inward[layer])
        heads = attend(layer).reshape(len(start), -1)
        x = x + torch.mm(heads, outward[layer])
        x = x + moe(layer, _normed(torch, x))


def _normed(torch: Any, x: Any) -> Any:  # noqa: ANN401
    return torch.nn.functional.rms_norm(x, x.shape[-1:])
