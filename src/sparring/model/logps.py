"""Log-probs of response tokens, packed or padded: the only place where labels are shifted, and where a loss meets the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.data.packing import Group, Packed, Padded, micro_batches, pack, packed_size, pad, padded_size
from sparring.model.attention import Kind, attending, inputs
from sparring.model.compiling import first_line
from sparring.model.head import Head

LossOf = Callable[[int, int, Tensor], Tensor]  # (first, last, sums [r, 2] of those groups) -> their share of the loss


@dataclass(frozen=True)
class Scorer:
    """Scores responses under a model; every layout gives the same numbers."""

    kind: Kind
    pad_id: int
    device: torch.device

    def size(self, group: Group) -> int:
        """Tokens that ``group`` takes of a micro-batch's budget."""
        return padded_size(group) if self.kind == "dense" else packed_size(group)

    def cut(self, groups: Sequence[Group], budget: int) -> list[list[int]]:
        """Micro-batches of ``groups``, as their places."""
        if self.kind == "dense":
            return _of_like_width(groups, budget)
        return micro_batches([self.size(group) for group in groups], budget)

    @torch.no_grad()
    def token_logps(self, model: Any, groups: Sequence[Group]) -> tuple[Tensor, Packed | Padded]:
        """log pi(y_t | x, y_<t) of the scored tokens, float32 [N], and the layout that says which they are."""
        if self.kind == "dense":
            padded = pad(groups, self.pad_id, self.device)
            return padded_logps(model, padded), padded
        packed = self._pack(groups)
        with attending(model, self.kind):
            hidden = self._hidden(model, packed)
        return Head(unwrapped(model)).logps(hidden, packed.scored.targets), packed

    def sums(self, model: Any, groups: Sequence[Group], spans: Tensor) -> Tensor:
        """Log-probs summed over each response's span and over all of it, [R, 2], without gradient."""
        logps, layout = self.token_logps(model, groups)
        return _both(layout, logps, spans, 0)

    def backward(self, model: Any, groups: Sequence[Group], spans: Tensor, loss_of: LossOf) -> None:
        """Add the gradient of the groups' losses to the weights'.

        ``loss_of`` may be asked group by group or for several at a time, always in order, with gradients by ``sums``.
        """
        if self.kind == "dense":
            padded = pad(groups, self.pad_id, self.device)
            loss_of(0, len(groups), _both(padded, padded_logps(model, padded), spans, 0)).backward()
            return
        packed = self._pack(groups)
        scored = packed.scored

        def slopes(first: int, last: int, logps: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = logps.requires_grad_()
                rows = slice(scored.row_bounds[first], scored.row_bounds[last])
                loss = loss_of(first, last, _both(packed, leaf, spans[rows], first))
            (slope,) = torch.autograd.grad(loss, leaf)
            return slope

        with attending(model, self.kind):
            hidden = self._hidden(model, packed)
            with torch.no_grad():
                head = Head(unwrapped(model))
                d_hidden = head.backward(hidden.detach(), scored.targets, scored.token_bounds, slopes)
            hidden.backward(d_hidden)

    def differentiate(self, model: Any, groups: Sequence[Group]) -> None:
        """A backward pass that leaves no gradient anywhere, and raises what one raises here."""
        bare = unwrapped(model)
        words = inputs(bare, self._pack(groups), self.kind)
        with torch.enable_grad(), attending(bare, self.kind):
            states = bare.get_input_embeddings()(words.pop("input_ids")).detach().requires_grad_()
            hidden = bare.base_model(inputs_embeds=states, **words).last_hidden_state
            torch.autograd.grad(hidden.float().sum(), states)

    def _pack(self, groups: Sequence[Group]) -> Packed:
        return pack(groups, self.device, even=self.kind == "flex")

    def _hidden(self, model: Any, packed: Packed) -> Tensor:
        """Final hidden states at the positions that predict the scored tokens, [N, H]."""
        bare = unwrapped(model)
        backbone = getattr(
            bare, "sparring_backbone", bare.base_model
        )  # a sharded model gathers its outer weights for it
        states: Tensor = backbone(**inputs(bare, packed, self.kind)).last_hidden_state[0]
        return states[packed.scored.predictors]


def padded_logps(model: Any, padded: Padded) -> Tensor:
    """The same by the model's own forward pass and whole logits, in float32; what every other layout is held to."""
    logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False).logits
    flat: Tensor = logits.flatten(0, 1)[padded.scored.predictors].float()
    return flat.gather(1, padded.scored.targets[:, None]).squeeze(1) - flat.logsumexp(1)


def checked(
    kind: Kind,
    model: Any,
    groups: Sequence[Group],
    pad_id: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    learns: bool = False,
) -> tuple[Scorer, str]:
    """A scorer of ``kind`` where it agrees with the dense one on the shortest of ``groups``, else the dense one; and why.

    ``dtype`` is that of the computation, and decides how near they have to be. ``learns``: a compiled kernel has to have a backward
    pass, too, which may want more of the device than it has.
    """
    dense = Scorer("dense", pad_id, device)
    if kind == "dense":
        return dense, "dense layout: one padded row for each response"
    shortest = sorted(groups, key=lambda g: sum(map(len, g.responses)) + len(g.prompt))[:3]
    if len(shortest) == 1:
        shortest *= 2  # what leaks from one sequence into the next shows only where there is a next
    scorer = Scorer(kind, pad_id, device)
    was_training = model.training
    model.eval()
    try:
        spans = torch.zeros(sum(len(g.responses) for g in shortest), 2, dtype=torch.long, device=device)
        mine, theirs = scorer.sums(model, shortest, spans)[:, 1], dense.sums(model, shortest, spans)[:, 1]
        lengths = torch.tensor([len(r) for g in shortest for r in g.responses], device=device)
        error = float(((mine - theirs).abs() / lengths).max())
        if learns and kind != "segments":
            scorer.differentiate(model, shortest)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as problem:
        return dense, f"dense layout, since this model cannot be packed: {first_line(problem)}"
    finally:
        model.train(was_training)
    limit = 1e-3 if dtype == torch.float32 and device.type == "cpu" else 5e-2
    if not error <= limit:
        return dense, f"dense layout, since packed ({kind}) log-probs are off by {error:.2g} nats per token"
    return scorer, f"packed layout ({kind}, common prefixes once), within {error:.1g} nats per token of the dense one"


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _both(layout: Packed | Padded, logps: Tensor, spans: Tensor, first: int) -> Tensor:
    """Sums over ``spans`` and over whole responses, [r, 2]."""
    rows = slice(layout.scored.row_bounds[first], layout.scored.row_bounds[first] + len(spans))
    lengths = layout.scored.lengths[rows]
    whole = torch.stack([torch.zeros_like(lengths), lengths], 1)
    return torch.stack([layout.scored.sums(logps, spans, first), layout.scored.sums(logps, whole, first)], 1)


def _of_like_width(groups: Sequence[Group], budget: int) -> list[list[int]]:
    """Micro-batches in falling order of width, each with as many rows as fit padded to its widest."""
    widths = [len(g.prompt) + max(map(len, g.responses)) for g in groups]
    batches: list[list[int]] = []
    rows = widest = 0
    for place in sorted(range(len(groups)), key=lambda i: (-widths[i], i)):
        count = len(groups[place].responses)
        if count * widths[place] > budget:
            raise ValueError(
                f"{count * widths[place]} tokens do not fit into max_tokens_per_micro_batch {budget}: raise it"
            )
        if not batches or (rows + count) * widest > budget:
            batches.append([])
            rows, widest = 0, widths[place]
        batches[-1].append(place)
        rows += count
    return sorted(sorted(places) for places in batches)
