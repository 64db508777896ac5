"""PyTorch, in a process of its own: it answers requests of a line each, in JSON.

{"problem": [...], "chunked": false, "gradient": true}   {"ready": true}
{"repeats": 3}                                           {"seconds": 0.01}, of one call
{"outcome": "file.npz"}                                  {"loss": 3.4}, the gradients in the file
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sxe._tools.bench.problem import Problem


def main() -> None:
    call: Any = None
    problem: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "problem" in request:
                problem = Problem(*request["problem"])
                call = _call(problem, request["chunked"], request["gradient"])
                call()
            elif "repeats" in request:
                start = time.perf_counter()
                for _ in range(request["repeats"]):
                    call()
                answer["seconds"] = (time.perf_counter() - start) / request["repeats"]
            else:
                loss, gradients = call()
                np.savez(request["outcome"], *_sampled(problem, problem.data()[-1], gradients))
                answer["loss"] = float(loss)
        except Exception as error:  # whatever it is, the other process reports it
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


def _call(problem: Problem, chunked: bool, gradient: bool) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, problem.dtype)
    *inputs, labels = (torch.from_numpy(x) for x in problem.data())
    # PyTorch has the kernel as [K, D].
    inputs = [x if i == 0 else x.T.contiguous() for i, x in enumerate(inputs)]
    inputs = [x.to(device, dtype).requires_grad_(gradient) for x in inputs]
    labels = labels.to(device, dtype) if problem.dense else labels.to(device, torch.long)

    def loss() -> Any:
        if problem.hidden is None:
            return F.cross_entropy(inputs[0], labels)
        if chunked:
            options = torch.nn.LinearCrossEntropyOptions()
            hidden, kernel = inputs
            return F.linear_cross_entropy(hidden, kernel, labels, options=options)
        return F.cross_entropy(F.linear(*inputs), labels)

    def call() -> Any:
        for x in inputs:
            x.grad = None
        value = loss()
        if gradient:
            value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach(), tuple(x.grad for x in inputs) if gradient else ()

    return call


def _sampled(problem: Problem, labels: Any, gradients: Any) -> list[Any]:
    return [
        (d[at] if i == 0 else d[at].T).float().cpu().numpy()
        for i, (d, at) in enumerate(zip(gradients, problem.samples(labels), strict=False))
    ]


if __name__ == "__main__":
    main()
