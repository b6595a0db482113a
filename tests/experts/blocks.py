"""Blocks of experts as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, NUM_EXPERTS, TOP_K = 16, 24, 6, 2


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Fused(nn.Module):
    """Gate and up in one matrix, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.into(x).chunk(2, dim=-1)
        return self.out(F.gelu(gate, approximate="tanh") * up)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.1))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NUM_EXPERTS, bias=False)


class Mixtral(Routed):
    """One-hot masks, `where`, `index_add_`, and the router's logits beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits = self.gate(hidden_states)
        weights, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), TOP_K, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(hidden_states.dtype)
        final = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        mask = F.one_hot(chosen, num_classes=NUM_EXPERTS).permute(2, 1, 0)
        for number in range(NUM_EXPERTS):
            index, top = torch.where(mask[number])
            current = hidden_states[None, top].reshape(-1, width)
            current = self.experts[number](current) * weights[top, index, None]
            final.index_add_(0, top, current.to(hidden_states.dtype))
        return final.reshape(batch, length, width), logits


class Masks(Routed):
    """Boolean masks, and idle experts skipped; gates of those that were not chosen are minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        top, indices = logits.topk(TOP_K, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, indices, top)
        gates = F.softmax(sparse, dim=-1)
        final = torch.zeros_like(x)
        flat_x, flat_gates = x.view(-1, x.size(-1)), gates.view(-1, gates.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                output = expert(flat_x[flat_mask])
                final[mask] += (output * flat_gates[flat_mask, i].unsqueeze(1)).squeeze(1)
        return final


class EveryExpert(Routed):
    """Every expert on every token, stacked, and a one-hot einsum that keeps two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Fused() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(TOP_K, dim=-1)
        combine = torch.einsum("btk,btke->bte", weights, F.one_hot(chosen, NUM_EXPERTS).to(x.dtype))
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        return torch.einsum("bte,btec->btc", combine, outputs)


class ByName(Routed):
    """A ModuleDict, top-1 with a sigmoid gate, and a sum that is not in place."""

    def __init__(self) -> None:
        super().__init__()
        self.specialists = nn.ModuleDict({f"number {i}": SwiGLU() for i in range(NUM_EXPERTS)})

    def forward(self, x: Tensor) -> Tensor:
        score, best = self.gate(x).max(dim=-1)
        total = 0
        for number, name in enumerate(self.specialists):
            is_its = (best == number).to(x.dtype) * score.sigmoid()
            total = total + self.specialists[name](x) * is_its.unsqueeze(-1)
        return total


class Gate(nn.Module):
    """A router that chooses, by scores and a bias that only the choice sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH))
        self.bias = nn.Parameter(torch.randn(NUM_EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        chosen = (scores + self.bias).topk(TOP_K, dim=-1)[1]
        weights = scores.gather(1, chosen)
        return (weights / weights.sum(-1, keepdim=True) * 1.5).type_as(x), chosen


class Shared(nn.Module):
    """A shared expert with a gate of its own; experts skipped by counts that are looked at on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))
        self.shared, self.shared_gate = SwiGLU(), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, *, is_last: bool = False) -> Tensor:
        shape = x.size()
        x = x.view(-1, shape[-1])
        weights, indices = self.gate(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=NUM_EXPERTS).tolist()
        for i in range(NUM_EXPERTS):
            if counts[i] == 0:
                continue
            idx, top = torch.where(indices == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return (y + self.shared(x) * self.shared_gate(x).sigmoid()).view(shape)


class Sorted(Routed):
    """Tokens sorted by expert, run group by group, put together and weighted at the end; added to what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Fused() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        identity, shape = x, x.shape
        x = x.view(-1, shape[-1])
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K, dim=-1)
        y = self.infer(x, ids, weights).view(*shape)
        return y + identity

    def infer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], NUM_EXPERTS)).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort()
        tokens = x[order // ids.shape[1]]
        outputs, start = [], 0
        for i, count in enumerate(counts.cpu().numpy()):
            if count == 0:
                continue
            outputs.append(self.experts[i](tokens[start : start + count]))
            start += count
        outs = torch.cat(outputs, dim=0)
        back = torch.empty_like(outs)
        back[order] = outs
        return back.view(*ids.shape, -1).mul_(weights.unsqueeze(-1)).sum(dim=1).type(x.dtype)


class Nested(nn.Module):
    """A loop over places and experts, with matrices in lists of their own, and biases that are added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, NUM_EXPERTS)
        self.first = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, HIDDEN) / 4) for _ in range(NUM_EXPERTS))
        self.second = nn.ParameterList(nn.Parameter(torch.randn(HIDDEN, WIDTH) / 4) for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(x)
        for k in range(TOP_K):
            for e in range(NUM_EXPERTS):
                mask = chosen[..., k] == e
                if mask.any():
                    h = F.silu(x[mask] @ self.first[e])
                    out[mask] += weights[..., k][mask].unsqueeze(-1) * (h @ self.second[e])
        return out


class Stacked(nn.Module):
    """Matrices and biases of all experts in one parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(WIDTH, NUM_EXPERTS))
        self.up, self.up_bias = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, HIDDEN) / 4), self._bias(HIDDEN)
        self.down, self.down_bias = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) / 4), self._bias(WIDTH)

    @staticmethod
    def _bias(width: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(NUM_EXPERTS, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores, chosen = (tokens @ self.router).topk(TOP_K, dim=-1)
        weights = scores.softmax(-1)
        out = torch.zeros_like(tokens)
        for expert in chosen.unique():
            rows, places = torch.where(chosen == expert)
            h = torch.addmm(self.up_bias[expert], tokens[rows], self.up[expert])
            y = F.gelu(h) @ self.down[expert] + self.down_bias[expert]
            out.index_add_(0, rows, y * weights[rows, places, None])
        return out.view_as(x)


class Dispatcher(nn.ModuleList):
    """Experts that are a list with a forward pass of its own, called with the choice."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self):
            rows, places = torch.where(chosen == i)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, places].unsqueeze(1))
        return out


class Outside(Routed):
    """The loop in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Dispatcher(mlp() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).sigmoid().topk(TOP_K)
        return self.experts(flat, chosen, weights).view_as(x)


GROUPED = (Mixtral, Masks, EveryExpert, ByName, Shared, Sorted, Nested, Stacked, Outside)


class ExpertChoice(Routed):
    """Experts choose their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        scores = self.gate(flat).softmax(-1)
        weights, tokens = scores.topk(max(1, len(flat) * TOP_K // NUM_EXPERTS), dim=0)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out.index_add_(0, tokens[:, i], expert(flat[tokens[:, i]]) * weights[:, i, None])
        return out.view_as(x)


class Capacity(Routed):
    """Experts leave out tokens that come when they are full."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(TOP_K, dim=-1)
        capacity = len(flat) // 2 + 4
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, places = (found[:capacity] for found in torch.where(chosen == i))
            out.index_add_(0, rows, expert(flat[rows]) * weights[rows, places, None])
        return out.view_as(x)


class NotLinear(Routed):
    """What experts give is bounded one by one, before it is added up."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight = (weights * (chosen == i)).sum(-1, keepdim=True)
            out = out + torch.tanh(expert(x)) * weight
        return out


class Noisy(Routed):
    """The router draws lots."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        weights, chosen = (logits + torch.randn_like(logits)).softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight = (weights * (chosen == i)).sum(-1, keepdim=True)
            out = out + expert(x) * weight
        return out


class Unlike(nn.Module):
    """Experts of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, w), nn.ReLU(), nn.Linear(w, WIDTH)) for w in (8, 16, 24)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(1, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True)
        return out


class Threshold(Routed):
    """Experts get the tokens that like them well enough, however many these are."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        least, _chosen = scores.topk(TOP_K, dim=-1)
        weights = scores * (scores >= least[..., -1:])
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = weights[..., i] > 0
            out[mask] += expert(x[mask]) * weights[mask][:, i, None]
        return out


class Looks(Routed):
    """Another router for inputs that are large."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        if x.abs().max() > 100:
            logits = -logits
        weights, chosen = logits.softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (chosen == i)).sum(-1, keepdim=True)
        return out


class Together(Routed):
    """No loop: weights of all experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        w1, w3, w2 = (torch.stack([getattr(e, name).weight for e in self.experts]) for name in ("w1", "w3", "w2"))
        h = F.silu(torch.einsum("btc,ehc->bteh", x, w1)) * torch.einsum("btc,ehc->bteh", x, w3)
        return torch.einsum("bteh,ech,bte->btc", h, w2, scores)


class Chain(nn.Module):
    """Modules that are alike, but called by nobody who chooses; their weights are used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.ModuleList(SwiGLU() for _ in range(NUM_EXPERTS))
        self.own = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)
