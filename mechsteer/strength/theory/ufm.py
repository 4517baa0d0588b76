"""The unconstrained features model: free embeddings and a linear decoder.

Taimeskhanov, Vaiter and Garreau 2026, definition 2.2 and appendix B.1.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechsteer.errors import MechsteerError
from mechsteer.progress import bar
from mechsteer.strength.theory.data import ConceptData, ContextSets

_CHECK_EVERY = 50


@dataclass(frozen=True, eq=False, repr=False)
class UFM:
    """Logits W h_j for the j-th distinct context, all in fp64 (definition 2.2).

        ufm = UFM.train(data)                    # gradient descent, as the paper does
        ufm = UFM.exact(data)                    # a minimiser in closed form

    Attributes:
        W: decoder.
        H: one embedding for each context, in columns.
        losses: cross-entropy in nats before each step of the training, if there was one.
    """

    W: Float[Tensor, "token d_model"]
    H: Float[Tensor, "d_model context"]
    losses: Float[Tensor, " step"] | None = None

    @property
    def logits(self) -> Float[Tensor, "context token"]:
        """f(c_j) (definition 2.2)."""
        return (self.W @ self.H).T

    @property
    def probs(self) -> Float[Tensor, "context token"]:
        return self.logits.softmax(-1)

    def cross_entropy(self, data: ConceptData) -> float:
        """Mean cross-entropy in nats over the training data (appendix B.5); never below `data.entropy`."""
        return float(-(data.pi * (data.probs * self.logits.log_softmax(-1)).sum(1)).sum())

    def error(self, data: ConceptData) -> float:
        """How far assumption 2 is from true: the largest |sigma_z(f(c_j)) - p(z | c_j)|."""
        return float((self.probs - data.probs).abs().max())

    def steering_vector(self, sets: ContextSets) -> Float[Tensor, " d_model"]:
        """Difference of means v (eq. 3)."""
        return self.H[:, sets.positive].mean(1) - self.H[:, sets.negative].mean(1)

    def steered_logits(
        self, v: Float[Tensor, " d_model"], alphas: Float[Tensor, " alpha"]
    ) -> Float[Tensor, "context alpha token"]:
        """f_alpha(c_j) = W (h_j + alpha v) (section 3.1)."""
        return (self.H.T[:, None] + alphas.double()[:, None] * v) @ self.W.T

    @staticmethod
    def exact(data: ConceptData, *, d_model: int | None = None) -> "UFM":
        """A model for which assumption 2 holds to rounding: the singular vectors of centred log-probabilities.

        Softmax ignores a constant added to a context's logits, so W H = log p - its mean over tokens; W and H take the
        square roots of its singular values each (balanced, as gradient descent from a small start leaves them).

        Args:
            data: to fit.
            d_model: dimensions; None takes as few as there can be.

        Raises:
            MechsteerError: `d_model` is below `least_d_model(data)`.
        """
        centred = _centred(data).T
        rank = least_d_model(data)
        d_model = _checked(data, d_model)
        u, s, vh = torch.linalg.svd(centred, full_matrices=False)
        W = torch.zeros(len(u), d_model, dtype=torch.float64)
        H = torch.zeros(d_model, vh.shape[1], dtype=torch.float64)
        root = s[:rank].sqrt()
        W[:, :rank], H[:rank] = u[:, :rank] * root, root[:, None] * vh[:rank]
        return UFM(W, H)

    @staticmethod
    def train(
        data: ConceptData,
        *,
        d_model: int | None = None,
        tolerance: float = 1e-9,
        max_steps: int = 20_000,
        momentum: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> "UFM":
        """Gradient descent on the cross-entropy from a random start, to the entropy bound (section 2.2, appendix B.1).

        Full-batch gradient descent on W and H. A step that does not lower the loss is not taken, and makes the next
        ones a fifth smaller. `momentum` is Nesterov's with adaptive restart (O'Donoghue and Candes 2015,
        arXiv:1204.3982); without it, it is plain gradient descent, with the same end in about ten times the steps.
        The paper gives neither `d_model` nor the settings of its training.

        Args:
            data: to fit.
            d_model: dimensions of the embeddings; None takes one more than `least_d_model(data)`, at which alone
                descent can stall, while many more slow it down.
            tolerance: ends when no probability is further off than this.
            max_steps: gives up after as many.
            momentum: see above.
            seed: of the start, normal with variance 1 / d_model.
            progress: show a bar.

        Raises:
            MechsteerError: `d_model` is too small for assumption 2, or the steps do not suffice.
        """
        d_model = _checked(data, d_model if d_model is not None else least_d_model(data) + 1)
        n_tokens, n_contexts = len(data.b), len(data.pi)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n_tokens + n_contexts, d_model, generator=generator, dtype=torch.float64) / math.sqrt(d_model)
        target, log_target = data.probs.T, data.probs.T.log()

        def excess(x: Tensor) -> float:
            # KL(p || q) as sum of p (e^t - 1 - t) with t = log(q / p), which keeps its digits down to 1e-20 where the
            # difference of two losses would be rounding.
            t = torch.log_softmax(x[:n_tokens] @ x[n_tokens:].T, 0) - log_target
            return float((data.pi * (target * (torch.expm1(t) - t)).sum(0)).sum())

        last, before, momentum_steps = excess(x), x, 0
        rate = 2 / float(data.pi.max())  # far above what is stable: it shrinks to the largest that is
        losses, error = [], math.inf
        with bar("training the UFM", max_steps // _CHECK_EVERY, show=progress) as shown:
            for step in range(max_steps):
                y = x + (momentum_steps / (momentum_steps + 3) if momentum else 0.0) * (x - before)
                W, H = y[:n_tokens], y[n_tokens:]
                off = (W @ H.T).softmax(0) - target
                error = float(off.abs().max())
                losses.append(last)
                if error < tolerance:
                    excesses = torch.tensor(losses, dtype=torch.float64)
                    return UFM(W, H.T, excesses + data.entropy)
                weighted = off * data.pi
                gradient = torch.cat([weighted @ H, weighted.T @ W])
                new = y - rate * gradient
                now = excess(new)
                if step % _CHECK_EVERY == 0:
                    shown.advance()
                if not now <= last:
                    rate, before, momentum_steps = 0.8 * rate, x, 0
                    continue
                uphill = float((gradient * (new - x)).sum()) > 0
                before, x, last, momentum_steps = x, new, now, 0 if uphill else momentum_steps + 1
        raise MechsteerError(
            f"UFM.train is {error:.3g} off after {max_steps} steps, and tolerance={tolerance} was asked for. Take more "
            "steps or a larger tolerance, or UFM.exact."
        )

    def __repr__(self) -> str:
        return f"UFM({self.W.shape[0]} tokens, {self.H.shape[1]} contexts, d_model {self.W.shape[1]})"


def least_d_model(data: ConceptData) -> int:
    """The least d_model for which assumption 2 can hold: the rank of log-probabilities centred over tokens.

    Logits of a perfect model are log p plus a constant for each context, and centring takes that constant off without
    raising the rank; so no smaller d_model will do, and this one does (`UFM.exact`). The paper does not name this
    condition. It is at most the number of concepts where a does not depend on the context, and one less on the instance
    of appendix B.1.
    """
    return int(torch.linalg.matrix_rank(_centred(data), rtol=1e-10))


def _centred(data: ConceptData) -> Tensor:
    logs = data.probs.log()
    return logs - logs.mean(1, keepdim=True)


def _checked(data: ConceptData, d_model: int | None) -> int:
    least = least_d_model(data)
    if d_model is not None and d_model < least:
        raise MechsteerError(
            f"UFM got d_model={d_model}, and these data take {least} for assumption 2: their log-probabilities have "
            "that rank."
        )
    return least if d_model is None else d_model
