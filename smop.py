"""Sparse Mixture of Projectors (SMoP): the projector of Llama-SMoP (arXiv 2505.14336) as PyTorch modules.

A router sends every token to `top_k` of `num_experts` small MLPs; the output is their weighted sum. Parameters grow
with `num_experts`, arithmetic only with `top_k`. This file needs torch alone; copy it into your own code:

    layer = SMoP(dim_in=1024, dim_out=2048, dim_hidden=2048, num_experts=4, top_k=2)
    y, routing = layer(x)                                              # x (..., 1024) -> y (..., 2048)
    loss = task_loss + 0.01 * routing.load_balancing_loss + 0.001 * routing.router_z_loss

Audio and video together, with the paper's configurations "DEDR", "JEDR" and "JEJR":

    projector = MultimodalSMoP({"audio": 512, "video": 1024}, dim_out=2048, config="DEDR")
    y, routing = projector({"audio": xa, "video": xv}, masks={"audio": ma, "video": mv})
    loss = task_loss + 0.01 * routing.load_balancing_loss + 0.001 * routing.router_z_loss

Legend: N tokens, E = num_experts, k = top_k, D = dim_in, O = dim_out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Routing(NamedTuple):
    """What the router decided. Padding (mask False) has weight exactly 0; its logits and experts mean nothing."""

    logits: torch.Tensor  # (..., E) float32 (float64 for float64 inputs)
    weights: torch.Tensor  # (..., k) of the chosen experts, best first
    experts: torch.Tensor  # (..., k) int64
    load_balancing_loss: torch.Tensor  # ()
    router_z_loss: torch.Tensor  # ()


class SMoP(nn.Module):
    """Top-k mixture of MLP projectors: y = sum over the chosen experts e of w_e(x) * expert_e(x).

    dim_in, dim_out: widths of the encoder's features and of the LLM's embeddings.
    dim_hidden: width inside an expert (default: dim_out).
    num_experts, top_k: how many experts there are, and how many each token passes through.
        num_experts=1, top_k=1 is the plain MLP projector of Llama-AVSR.
    renormalize: scale the k chosen probabilities to sum 1, the published rule and the default but for top_k=1. There
        the weight would be the constant 1 and the task loss would give the router no gradient; by default it is the
        probability itself.

    Every expert takes part in every step, with no tokens if need be, so that its gradient is 0 and not None:
    DistributedDataParallel works without find_unused_parameters.
    """

    def __init__(self, dim_in, dim_out, dim_hidden=None, num_experts=4, top_k=2, renormalize=None):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={num_experts}, got {top_k}")
        dim_hidden = dim_out if dim_hidden is None else dim_hidden
        self.dim_out, self.top_k = dim_out, top_k
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.gate = nn.Linear(dim_in, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim_in, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim_out), nn.LayerNorm(dim_out)
            )
            for _ in range(num_experts)
        )

    def forward(self, x, mask=None, process_group=None):
        """Project x (..., D) to (..., O); returns (y, Routing).

        mask (...) bool, True = a real token. Padding is never given to an expert and yields zeros: it changes no
        output of a real token, no loss and no gradient, whatever it holds.
        process_group: the losses are over the tokens of all its processes, as if they were one batch; see `mean_of`.
        """
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask {mask.dtype} {tuple(mask.shape)} for x {tuple(x.shape)}: bool {tuple(x.shape[:-1])} expected"
            )
        routing = self.route(x, mask, process_group)
        tokens = x.reshape(-1, x.shape[-1])  # (N, D)
        experts = routing.experts.view(-1, self.top_k)  # (N, k)
        if mask is not None:
            experts = experts.masked_fill(~mask.reshape(-1, 1), len(self.experts))  # one past the last: skipped
        y = self.mix(tokens, experts, routing.weights.view(-1, self.top_k))  # (N, O)
        return y.view(*x.shape[:-1], self.dim_out), routing

    def route(self, x, mask=None, process_group=None):
        """Router: linear, softmax over all experts, top-k. In float32 at least: rounding to bf16 makes ties."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype) if mask is None else x.to(dtype).masked_fill(~mask[..., None], 0)  # NaN * 0 is NaN
            logits = F.linear(x, self.gate.weight.to(dtype))  # (..., E)
            weights, experts = logits.softmax(-1).topk(self.top_k)  # (..., k)
            if self.renormalize:
                weights = weights / weights.sum(-1, keepdim=True)
            if mask is not None:
                weights = weights.masked_fill(~mask[..., None], 0)
            balance = load_balancing_loss(logits, experts, mask, process_group)
            return Routing(logits, weights, experts, balance, router_z_loss(logits, mask, process_group))

    def mix(self, tokens, experts, weights):
        """Weighted sum of the chosen experts: tokens (N, D), experts and weights (N, k) -> (N, O).

        The (token, expert) pairs are sorted by expert, so that each expert multiplies one contiguous block. As no token
        meets an expert twice, `index_add_` adds each block without collisions: the sum is the same every time.
        """
        order = experts.flatten().argsort(stable=True)  # (N*k,)
        counts = F.one_hot(experts.flatten(), len(self.experts) + 1).sum(0).tolist()  # the one wait for the GPU
        token, weight = order // self.top_k, weights.flatten().index_select(0, order)  # (N*k,) of each pair
        blocks = tokens.index_select(0, token).split(counts)  # the last one is padding
        outputs = [expert(block) for expert, block in zip(self.experts, blocks)]
        y = outputs[0].new_zeros(len(tokens), self.dim_out)  # (N, O)
        for output, t, w in zip(outputs, token.split(counts), weight.to(y.dtype).split(counts)):
            y.index_add_(0, t, w.unsqueeze(-1) * output)
        return y


def load_balancing_loss(logits, experts, mask=None, process_group=None):
    """E * sum_e f_e * P_e: small when the tokens are spread evenly over the experts.

    f_e is the share of tokens that chose expert e in any of their k slots, P_e its mean probability, over real
    tokens. A balanced router gives k (in expectation; exactly E when k = E), a collapsed one up to E.
    logits (..., E), experts (..., k), mask (...) bool, process_group as in SMoP.forward. Zero tokens give 0.
    Source: Switch Transformer (arXiv 2101.03961), eq. 4-6, summed over slots as in the authors' published code.
    """
    num_experts = logits.shape[-1]
    chosen = F.one_hot(experts, num_experts).sum(-2)  # (..., E)
    share = _token_mean(chosen.to(logits.dtype), mask, process_group)  # (E,)
    return num_experts * (share * _token_mean(logits.softmax(-1), mask, process_group)).sum()


def router_z_loss(logits, mask=None, process_group=None):
    """Mean over real tokens of logsumexp(logits)^2: keeps the logits small, where the softmax is exact.

    logits (..., E), mask (...) bool, process_group as in SMoP.forward. A uniform router with logits 0 gives
    log(E)^2. Zero tokens give 0.
    Source: ST-MoE (arXiv 2202.08906), eq. 5.
    """
    return _token_mean(logits.logsumexp(-1, keepdim=True) ** 2, mask, process_group).squeeze()


def _token_mean(values, mask, process_group):
    """Mean of values (..., X) over the tokens where mask (...) is True: (X,)."""
    values = values.reshape(-1, values.shape[-1])
    if mask is None:
        return mean_of(values.sum(0), torch.tensor(len(values)), process_group)
    mask = mask.reshape(-1, 1)
    return mean_of(values.masked_fill(~mask, 0).sum(0), mask.sum(), process_group)


def mean_of(total, count, process_group=None):
    """total / count (at least 1); with a process_group, those of all its processes together: total (...), count ().

    The value is that of the whole in every process. DistributedDataParallel averages the gradients of the processes, so
    each process's own part enters with its gradient times their number: the average is then the gradient of the whole.
    Nothing is communicated in the backward pass, where it could get between DistributedDataParallel's own.
    """
    if process_group is not None:
        sums = torch.cat([total.detach().flatten(), count.to(total).view(1)])
        torch.distributed.all_reduce(sums, group=process_group)
        own = torch.distributed.get_world_size(process_group) * (total - total.detach())  # 0, with that gradient
        total, count = sums[:-1].view_as(total) + own, sums[-1]
    return total / count.clamp(min=1)


class MultimodalRouting(dict):
    """{modality: Routing}, whose losses are over that modality's own tokens, and the two losses to train with:
    over all tokens together for a joint router (balanced: top_k), summed over the modalities for disjoint routers
    (balanced: top_k per modality)."""

    load_balancing_loss: torch.Tensor
    router_z_loss: torch.Tensor


class MultimodalSMoP(nn.Module):
    """One mixture of projectors for several modalities, in one of the paper's three configurations.

        config   experts               routers
        "DEDR"   one set per modality  one per modality  (disjoint experts, disjoint routers: the paper's best)
        "JEDR"   one set for all       one per modality  (joint experts, disjoint routers)
        "JEJR"   one set for all       one for all       (joint experts, joint router: the authors' published code)

    dims: {modality: width of its features}; a single modality is allowed in every configuration.
    The other arguments are SMoP's. `self.smops[modality]` is that modality's SMoP; what is joint is the same module
    in each, and its state_dict names it once per modality. Joint parts need equal widths (ValueError).
    """

    CONFIGS = ("DEDR", "JEDR", "JEJR")

    def __init__(self, dims, dim_out, config="DEDR", **kwargs):
        super().__init__()
        if config not in self.CONFIGS:
            raise ValueError(f"config must be one of {', '.join(self.CONFIGS)}, got {config!r}")
        if config != "DEDR" and len(set(dims.values())) > 1:
            raise ValueError(f"{config} shares its experts, so all widths must be equal, got {dims}; use DEDR")
        self.config = config
        self.smops = nn.ModuleDict({modality: SMoP(dim, dim_out, **kwargs) for modality, dim in dims.items()})
        first = next(iter(self.smops.values()))
        for smop in self.smops.values():
            if config in ("JEDR", "JEJR"):
                smop.experts = first.experts
            if config == "JEJR":
                smop.gate = first.gate

    def forward(self, features, masks=None, process_group=None):
        """features {modality: (..., D)}, masks {modality: (...) bool} or None -> ({modality: (..., O)}, MultimodalRouting)."""
        outputs, routing = {}, MultimodalRouting()
        for modality, x in features.items():
            mask = None if masks is None else masks[modality]
            outputs[modality], routing[modality] = self.smops[modality](x, mask, process_group)
        if self.config == "JEJR":  # one router: its losses are over the tokens of all modalities together
            logits = torch.cat([r.logits.flatten(0, -2) for r in routing.values()])  # (N, E)
            experts = torch.cat([r.experts.flatten(0, -2) for r in routing.values()])  # (N, k)
            mask = None if masks is None else torch.cat([masks[modality].flatten() for modality in features])
            routing.load_balancing_loss = load_balancing_loss(logits, experts, mask, process_group)
            routing.router_z_loss = router_z_loss(logits, mask, process_group)
        else:
            routing.load_balancing_loss = sum(r.load_balancing_loss for r in routing.values())
            routing.router_z_loss = sum(r.router_z_loss for r in routing.values())
        return outputs, routing
