"""Preference losses as pure functions: log-prob tensors in, one loss per pair out; the caller averages.

    shapes    every tensor is [B], one entry per pair; the result is [B]; `kl` alone is a scalar
    units     nats; log-probs and log-ratios are summed over the response's tokens
    dtype     the first tensor's, at least fp32 (float64 stays); so float64 win rates do not promote the loss
    legend    w, l     chosen (wins), rejected (loses)
              lw, ll   chosen_ratio, rejected_ratio = log pi - log pi_ref
              mw, ml   token-mean log-probs = chosen / chosen_tokens, rejected / rejected_tokens
              s(.)     the logistic sigmoid

Token counts are at least 1 and win rates lie in [0, 1]; neither is checked, since looking would wait for the GPU.
Besides what its docstring names, every function raises ValueError for shapes that are not one and the same [B].
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "dpo",
    "dpop",
    "hinge",
    "ipo",
    "kto",
    "nll",
    "odds_ratio",
    "orpo",
    "reward_metrics",
    "simpo",
    "sppo",
    "sppo_hard",
]


def dpo(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss on the margin of implicit rewards; with label smoothing, conservative DPO.

        loss = -(1 - e) log s(z) - e log s(-z),    z = beta (lw - ll),    e = label_smoothing

    e is the probability that a pair's labels are swapped.

    Raises ValueError unless beta > 0 and 0 <= label_smoothing < 0.5.
    Source: arXiv 2305.18290 eq. 7; for e > 0, Mitchell's note on noisy preferences (ericmitchell.ai/cdpo.pdf) eq. 3.
    SAPO-DPO (2405.20830) and SPIN (2401.01335) use it with e = 0.
    """
    _check_beta(beta)
    _check(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "0.5 is pure noise", "a value in [0, 0.5)")
    lw, ll = aligned(chosen_ratio, rejected_ratio)
    z = beta * (lw - ll)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def hinge(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float = 0.1) -> Tensor:
    """Hinge loss on the margin of implicit rewards: zero, with zero gradient, from a margin of 1 on.

        loss = max(0, 1 - beta (lw - ll))

    Raises ValueError unless beta > 0.
    Source: SLiC-HF's hinge (arXiv 2305.10425), on log-ratios as in RSO's hinge-norm (arXiv 2309.06657).
    """
    _check_beta(beta)
    lw, ll = aligned(chosen_ratio, rejected_ratio)
    return torch.relu(1 - beta * (lw - ll))


def ipo(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float = 0.1,
    token_mean: bool = True,
) -> Tensor:
    """Squared distance of the log-ratio margin from its target, so that a separable pair cannot push it to infinity.

        loss = (h - 1 / (2 beta))^2,    h = lw / |w| - ll / |l|  if token_mean else  lw - ll

    beta is the paper's tau; |w|, |l| are the token counts. The formula as printed is summed; the authors' own results
    use the token mean, as TRL reports from them.

    Raises ValueError unless beta > 0.
    Source: arXiv 2310.12036 eq. 17.
    """
    _check_beta(beta)
    lw, ll, tokens_w, tokens_l = aligned(chosen_ratio, rejected_ratio, chosen_tokens, rejected_tokens)
    h = lw / tokens_w - ll / tokens_l if token_mean else lw - ll
    return (h - 1 / (2 * beta)).square()


def odds_ratio(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, *, floor: float = 0.0
) -> Tensor:
    """Logistic loss on the log odds ratio of the two responses; no reference model.

        loss = -log s(o(mw) - o(ml)),    o(m) = log(p / (1 - p)) = m - log(1 - e^m),    p = e^m

    o's slope is 1 / (1 - p), about 1 / |m|: it has no bound as p goes to 1. `floor`, in nats per token, is a lower
    bound on |m| inside 1 - e^m, so the slope stays below 1 / floor + 1, and is 1 under the floor: a response that the
    policy is nearly sure of is still pushed. floor = 0 is the exact formula down to |m| = the dtype's epsilon (1.2e-7
    in fp32, about where p rounds to 1), which bounds value and gradient even at m = 0.

    Raises ValueError unless floor >= 0.
    Source: arXiv 2403.07691 eq. 7. The floor is ours.
    """
    _check(0 <= floor < torch.inf, "floor", floor, "it is a lower bound on |mean log-prob|", "a finite floor >= 0")
    logp_w, logp_l, tokens_w, tokens_l = aligned(chosen, rejected, chosen_tokens, rejected_tokens)
    return -logsigmoid(_log_odds(logp_w / tokens_w, floor) - _log_odds(logp_l / tokens_l, floor))


def orpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float = 0.1,
    floor: float = 0.0,
) -> Tensor:
    """Likelihood of the chosen response plus a weighted odds-ratio term; no reference model.

        loss = -mw + beta odds_ratio(w, l)

    beta is the paper's lambda (TRL calls it beta); 0 leaves `nll`. The likelihood is that of the response alone;
    the original's and TRL's code add the prompt's tokens to it.

    Raises ValueError unless beta >= 0 and floor >= 0.
    Source: arXiv 2403.07691 eq. 6; SAPO-ORPO (2405.20830) uses it with beta = 0.05.
    """
    _check_weight("beta", beta)
    return nll(chosen, chosen_tokens) + beta * odds_ratio(chosen, rejected, chosen_tokens, rejected_tokens, floor=floor)


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """Logistic loss on the margin of token-mean log-probs beyond a target margin; no reference model.

        loss = -log s(beta (mw - ml) - gamma)

    gamma is in reward units, outside beta; published settings are often given as the ratio gamma / beta.

    Raises ValueError unless beta > 0 and gamma >= 0.
    Source: arXiv 2405.14734.
    """
    _check_beta(beta)
    _check(0 <= gamma < torch.inf, "gamma", gamma, "a negative target margin rewards misranking", "a finite gamma >= 0")
    logp_w, logp_l, tokens_w, tokens_l = aligned(chosen, rejected, chosen_tokens, rejected_tokens)
    return -logsigmoid(beta * (logp_w / tokens_w - logp_l / tokens_l) - gamma)


def kto(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    *,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Prospect-theoretic value of each response against a reference point, summed over the pair's two responses.

        loss = desirable_weight (1 - s(beta lw - z0)) + undesirable_weight (1 - s(z0 - beta ll)),
        z0 = beta max(0, kl)

    kl: scalar, nats; an estimate of KL(pi || pi_ref), the mean log-ratio of mismatched prompts and responses. It is
    clamped at 0 and detached here. A pair counts as one desirable and one undesirable example.

    Raises ValueError unless beta > 0, both weights >= 0, and kl has no dimensions.
    Source: arXiv 2402.01306; the full form is a reconstruction.
    """
    _check_beta(beta)
    _check_weight("desirable_weight", desirable_weight)
    _check_weight("undesirable_weight", undesirable_weight)
    if kl.ndim != 0:
        raise ValueError(f"kl has shape {tuple(kl.shape)}: the reference point is one per batch; pass its mean")
    lw, ll = aligned(chosen_ratio, rejected_ratio)
    z0 = beta * kl.detach().clamp(min=0).to(lw.dtype)
    # 1 - s(x) = s(-x), without the cancellation where s(x) is close to 1.
    return desirable_weight * torch.sigmoid(z0 - beta * lw) + undesirable_weight * torch.sigmoid(beta * ll - z0)


def dpop(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> Tensor:
    """DPO with a penalty, inside the sigmoid, on any fall of the chosen response below the reference (DPO-Positive).

        loss = -log s(beta (lw - ll - dpop_lambda max(0, -lw)))

    dpop_lambda = 0 is `dpo`. Some ports put the penalty outside the sigmoid: another loss.

    Raises ValueError unless beta > 0 and dpop_lambda >= 0.
    Source: arXiv 2402.13228; the formula is a reconstruction, the default of 50 is that of public trainers.
    """
    _check_beta(beta)
    _check_weight("dpop_lambda", dpop_lambda)
    lw, ll = aligned(chosen_ratio, rejected_ratio)
    return -logsigmoid(beta * (lw - ll - dpop_lambda * torch.relu(-lw)))


def sppo(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    chosen_win_rate: Tensor,
    rejected_win_rate: Tensor,
    *,
    beta: float = 0.001,
) -> Tensor:
    """Regression of each response's log-ratio on its win rate against the reference policy.

        loss = 1/2 [ (lw - (Pw - 1/2) / beta)^2 + (ll - (Pl - 1/2) / beta)^2 ]

    beta = 1 / eta of the paper. Pw, Pl: the response's own mean win rate over all K samples, itself (1/2) included.
    P(w > l) and 1 - P(w > l) in their place are the authors' "sppo_single". Losses near 1e5 are usual at this beta.

    Raises ValueError unless beta > 0.
    Source: arXiv 2405.00675 eq. 4.7, with the factor 1/2 of the authors' code.
    """
    _check_beta(beta)
    lw, ll, pw, pl = aligned(chosen_ratio, rejected_ratio, chosen_win_rate, rejected_win_rate)
    return 0.5 * ((lw - (pw - 0.5) / beta).square() + (ll - (pl - 0.5) / beta).square())


def sppo_hard(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float = 0.001) -> Tensor:
    """SPPO with the win rates set to 1 and 0, scaled as in TRL: twice `sppo`.

        loss = (lw - 1 / (2 beta))^2 + (ll + 1 / (2 beta))^2

    Raises ValueError unless beta > 0.
    Source: arXiv 2405.00675 eq. 4.7 with hard labels; TRL's "sppo_hard", without the factor 1/2.
    """
    _check_beta(beta)
    lw, ll = aligned(chosen_ratio, rejected_ratio)
    return (lw - 0.5 / beta).square() + (ll + 0.5 / beta).square()


def nll(chosen: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response per token: supervised fine-tuning on it.

        loss = -mw

    Its batch mean weighs responses alike, not tokens.
    """
    logp_w, tokens_w = aligned(chosen, chosen_tokens)
    return -logp_w / tokens_w


def reward_metrics(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float) -> dict[str, Tensor]:
    """Batch means of the implicit rewards, under the names the field uses; scalars without gradient.

        rewards/chosen      mean beta lw              rewards/rejected    mean beta ll
        rewards/margins     mean beta (lw - ll)       rewards/accuracies  share of pairs with beta lw > beta ll

    A tie is not a win. Raises ValueError unless beta > 0.
    Source: implicit rewards as in arXiv 2305.18290; names as TRL logs them.
    """
    _check_beta(beta)
    rewards_w, rewards_l = (beta * ratio.detach() for ratio in aligned(chosen_ratio, rejected_ratio))
    return {
        "rewards/chosen": rewards_w.mean(),
        "rewards/rejected": rewards_l.mean(),
        "rewards/margins": (rewards_w - rewards_l).mean(),
        "rewards/accuracies": (rewards_w > rewards_l).to(rewards_w.dtype).mean(),
    }


def _log_odds(mean: Tensor, floor: float) -> Tensor:
    """log(p / (1 - p)) of mean = log p, with |mean| at least `floor` (and the dtype's epsilon) inside 1 - p."""
    # log(-expm1(x)) alone serves the whole range: near 0 it is exact, far below 0 it is off by at most an epsilon.
    # The usual second branch, log1p(-exp(x)) under torch.where, turns into NaN in the backward pass as x nears 0.
    bounded = mean.clamp(max=-max(floor, torch.finfo(mean.dtype).eps))
    return mean - torch.log(-torch.expm1(bounded))


def aligned(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the first one's dtype, fp32 at least; they share one shape [B], since [B, 1] would broadcast."""
    if tensors[0].ndim != 1 or any(tensor.shape != tensors[0].shape for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"shapes {shapes}: a loss takes one value per pair; pass tensors of one shape [B]")
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _check(valid: bool, option: str, value: float, reason: str, remedy: str) -> None:
    if not valid:
        raise ValueError(f"{option}={value}: {reason}; pass {remedy}")


def _check_beta(beta: float) -> None:
    _check(0 < beta < torch.inf, "beta", beta, "it scales what is learned", "a finite beta > 0")


def _check_weight(option: str, weight: float) -> None:
    _check(0 <= weight < torch.inf, option, weight, "a negative weight rewards the error", "a finite weight >= 0")
