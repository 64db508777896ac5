"""PyTorch and the libraries built on it, in a separate process.

Requests and answers are lines of JSON. Every request except the first names a contestant.

{"problem": [...], "gradient": true, "peers": [...]}   {"contestants": ["torch", ...]}
{"prepare": "torch"}                                   {"compile_seconds": 1.2,
                                                        "temporary_bytes": 0 or null}
{"time": "torch", "repeats": 3}                        {"seconds": 0.01}, for one call
{"outcome": "torch", "file": "file.npz"}               {"loss": 3.4}; file: gradients
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sxe._tools.bench.problem import Problem


def main() -> None:
    # Libraries may print. Their output goes to standard error, not between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contestants: Contestants | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if contestants is None:
                problem = Problem(*request["problem"])
                contestants = Contestants(
                    problem, gradient=request["gradient"], peers=request["peers"]
                )
                answer: dict[str, Any] = {"contestants": list(contestants.losses)}
            elif "prepare" in request:
                answer = contestants.prepare(request["prepare"])
            elif "time" in request:
                answer = {"seconds": contestants.seconds(request["time"], request["repeats"])}
            else:
                answer = {"loss": contestants.outcome(request["outcome"], request["file"])}
        except Exception as error:  # the other process reports any error
            answer = {"error": f"{type(error).__name__}: {error}"}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        print(json.dumps(answer), file=answers, flush=True)


class Contestants:
    """All contestants of one problem.

    Attributes:
      losses: functions of the inputs and the labels, by name.
    """

    def __init__(self, problem: Problem, *, gradient: bool, peers: list[str]) -> None:
        self._problem, self._gradient = problem, gradient
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, problem.dtype)
        *inputs, labels = problem.data()
        self._at = problem.samples(labels)
        on_device = [torch.from_numpy(x).to(self._device, dtype) for x in inputs]
        # PyTorch expects the kernel as [K, D].
        on_device = [x if i == 0 else x.T.contiguous() for i, x in enumerate(on_device)]
        self._inputs = [x.requires_grad_(gradient) for x in on_device]
        self._overwritten: list[Any] | None = None
        self._labels = torch.from_numpy(labels).to(
            self._device, dtype if problem.dense else torch.long
        )
        self.losses = _losses(problem, self._device, peers)

    def prepare(self, name: str) -> dict[str, Any]:
        start = time.perf_counter()
        self._call(name)
        self._wait()
        seconds = time.perf_counter() - start
        if self._device == "cpu":
            return {"compile_seconds": None, "temporary_bytes": None}
        # Measure a second call, because the first one may have tried several kernels.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, gradients = self._call(name)
        self._wait()
        inputs = {x.data_ptr() for x in self._inputs_of(name)}
        results = [d.nbytes for d in gradients if d.data_ptr() not in inputs]
        peak = torch.cuda.max_memory_allocated() - before - sum(results)
        return {"compile_seconds": seconds, "temporary_bytes": max(0, peak)}

    def seconds(self, name: str, repeats: int) -> float:
        """The time of one call. A GPU runs repeated calls in order, and is kept busy."""
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            self._call(name)
        self._wait()
        return (time.perf_counter() - start) / repeats

    def outcome(self, name: str, file: str) -> float:
        """Write the sampled gradients to a file, and return the loss."""
        with torch.no_grad():
            for x, fresh in zip(self._inputs_of(name), self._inputs, strict=True):
                x.copy_(fresh)
        loss, gradients = self._call(name)
        sampled = [
            (d[at] if i == 0 else d[at].T).float().cpu().numpy()
            for i, (d, at) in enumerate(zip(gradients, self._at, strict=False))
        ]
        np.savez(file, *sampled)
        return float(loss)

    def _call(self, name: str) -> tuple[Any, tuple[Any, ...]]:
        inputs = self._inputs_of(name)
        loss = self.losses[name](*inputs, self._labels)
        gradients = torch.autograd.grad(loss, inputs) if self._gradient else ()
        return loss.detach(), gradients

    def _inputs_of(self, name: str) -> list[Any]:
        """The inputs. Liger overwrites its logits with their gradient, so it gets a copy."""
        if name != "Liger" or self._problem.hidden is not None:
            return self._inputs
        if self._overwritten is None:
            copies = [x.detach().clone() for x in self._inputs]
            self._overwritten = [x.requires_grad_(self._gradient) for x in copies]
        return self._overwritten

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def _losses(problem: Problem, device: str, peers: list[str]) -> dict[str, Callable[..., Any]]:
    """The functions that can run here, by name. Each imports its library in its first call."""
    found: dict[str, Callable[..., Any]] = {}
    if "torch" in peers:
        found["torch"] = F.cross_entropy if problem.hidden is None else _on_logits
    if problem.hidden is None:
        if device == "cuda" and "torch" in peers:
            found["torch.compile"] = torch.compile(F.cross_entropy)
        if device == "cuda" and "liger-kernel" in peers and not problem.dense:
            found["Liger"] = _liger
        return found
    if "torch" in peers and hasattr(F, "linear_cross_entropy"):
        found["torch chunked"] = _chunked
    if device == "cuda" and "liger-kernel" in peers:
        found["Liger"] = _liger_head
    if device == "cuda" and "cut-cross-entropy" in peers:
        found["CCE"] = _cce
        found["CCE, unfiltered"] = _cce_unfiltered
    return found


def _on_logits(hidden: Any, kernel: Any, labels: Any) -> Any:
    return F.cross_entropy(F.linear(hidden, kernel), labels)


def _chunked(hidden: Any, kernel: Any, labels: Any) -> Any:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, kernel, labels, options=options)


def _liger(logits: Any, labels: Any) -> Any:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, labels)


def _liger_head(hidden: Any, kernel: Any, labels: Any) -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, kernel, labels)


def _cce(hidden: Any, kernel: Any, labels: Any) -> Any:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, kernel, labels, impl="cce")


def _cce_unfiltered(hidden: Any, kernel: Any, labels: Any) -> Any:
    """CCE that also computes small gradient entries, which it skips by default."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, kernel, labels, filter_eps=None, impl="cce")


if __name__ == "__main__":
    main()
